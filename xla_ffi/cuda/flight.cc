// Copies of experts to other ranks by copy engines, beside XLA's stream.
//
// XLA takes the work of "lplb_start_flight" for done when the handler returns. So every array that
// leaves is an operand of "lplb_take_flight", too, and stays as it is until then. Neither target
// may be captured into a command buffer: a graph must not end between the two.
#include "xla_ffi/cuda/flight.h"

#include <algorithm>
#include <stdexcept>

#include "xla_ffi/cuda/comm.h"
#include "xla_ffi/cuda/handler.h"

namespace lplb {
namespace {

constexpr int64_t RoundedUp(int64_t bytes) { return (bytes + 127) / 128 * 128; }
constexpr int64_t kHeaderBytes = RoundedUp(sizeof(cuda::HangarHeader));

void ThrowIf(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + cudaGetErrorString(error));
}

// Each rank once.
cuda::FlightRanks Distinct(std::vector<int32_t> ranks) {
  std::sort(ranks.begin(), ranks.end());
  ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  cuda::FlightRanks distinct = {};
  for (const int32_t rank : ranks) distinct.of[distinct.n++] = rank;
  return distinct;
}

// The first error of several steps.
class Steps {
 public:
  Steps& Then(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
    return *this;
  }
  std::string Error() const { return error_ == cudaSuccess ? "" : cudaGetErrorString(error_); }

 private:
  cudaError_t error_ = cudaSuccess;
};

}  // namespace

int64_t Flights::HangarBytes(int64_t copy_bytes) {
  return kHeaderBytes + 2 * RoundedUp(copy_bytes);
}

Flights::Flights(const cuda::Peers& peers, const std::vector<uintptr_t>& hangars, int64_t bytes)
    : bytes_(bytes) {
  if (peers.size > cuda::HangarHeader::kMostRanks) {
    throw std::runtime_error("copies: more than 512 ranks");
  }
  for (const uintptr_t hangar : hangars) all_.push_back(reinterpret_cast<char*>(hangar));
  const size_t table_bytes = all_.size() * sizeof(char*);
  ThrowIf(cudaMalloc(&table_, table_bytes), "cudaMalloc: ");
  ThrowIf(cudaMemcpy(table_, all_.data(), table_bytes, cudaMemcpyHostToDevice), "cudaMemcpy: ");
  ThrowIf(cudaStreamCreateWithFlags(&beside_, cudaStreamNonBlocking), "cudaStreamCreate: ");
  ThrowIf(cudaEventCreateWithFlags(&fork_, cudaEventDisableTiming), "cudaEventCreate: ");
  hangars_ = {peers, static_cast<char* const*>(table_), all_.at(peers.rank)};
}

Flights::~Flights() {
  for (const cudaEvent_t event : idle_) cudaEventDestroy(event);
  cudaEventDestroy(fork_);
  cudaStreamDestroy(beside_);
  cudaFree(table_);
}

int64_t Flights::AddRoute(FlightRoute route) {
  if (route.to.size() != route.from.size() || route.to.empty() ||
      route.to.size() > cuda::FlightRanks::kMost) {
    throw std::runtime_error("copies: expected 1 to 32 columns");
  }
  for (const auto* ranks : {&route.to, &route.from}) {
    for (const int32_t rank : *ranks) all_.at(rank);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  routes_.push_back(std::move(route));
  return static_cast<int64_t>(routes_.size()) - 1;
}

cudaError_t Flights::TakeEvent(cudaEvent_t* event) {
  if (idle_.empty()) return cudaEventCreateWithFlags(event, cudaEventDisableTiming);
  *event = idle_.back();
  idle_.pop_back();
  return cudaSuccess;
}

uint32_t Flights::Place(Flight* flight, int64_t n_bytes) {
  if (cursor_ + n_bytes > bytes_) cursor_ = 0;
  if (cursor_ == 0) cursor_ = kHeaderBytes;
  flight->begin = cursor_;
  flight->end = cursor_ = cursor_ + RoundedUp(n_bytes);
  uint32_t before = forgotten_;
  for (const Flight& earlier : placed_) {
    if (earlier.begin < flight->end && flight->begin < earlier.end) before = earlier.number;
  }
  placed_.push_back(*flight);
  if (placed_.size() > kMostPlaced) {
    forgotten_ = placed_.front().number;
    placed_.pop_front();
  }
  return before;
}

std::string Flights::Start(int64_t route, bool against, int32_t n_copies,
                           const std::vector<FlightArray>& arrays, float* number,
                           cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (route >= static_cast<int64_t>(routes_.size())) return "unknown topology";
  const FlightRoute& along = routes_[route];
  const std::vector<int32_t>& to = against ? along.from : along.to;
  Flight flight = {++last_, 0, 0, {}, Distinct(against ? along.to : along.from), nullptr};
  int64_t total = 0;
  for (const FlightArray& array : arrays) {
    flight.bytes.push_back(n_copies * array.bytes);
    total += n_copies * array.bytes;
  }
  if (kHeaderBytes + total > bytes_) {
    return "comm: it has room for " + std::to_string(bytes_ - kHeaderBytes) +
           " bytes of copies, and this call needs " + std::to_string(total) +
           "; raise copy_bytes in init_comm";
  }
  const uint32_t before = Place(&flight, total);
  const cuda::FlightRanks receivers = Distinct(to);
  Steps steps;
  steps.Then(TakeEvent(&flight.left))
      .Then(cuda::LaunchNumber(flight.number, number, stream))
      .Then(cudaEventRecord(fork_, stream))
      .Then(cudaStreamWaitEvent(beside_, fork_, 0))
      .Then(cuda::LaunchAwaitFreed(hangars_, receivers, before, beside_));
  int64_t at = flight.begin;
  for (const FlightArray& array : arrays) {
    for (int32_t copy = 0; copy < n_copies; ++copy, at += array.bytes) {
      char* place = all_[to[copy % to.size()]] + at;
      steps.Then(cudaMemcpyAsync(place, array.data + copy * array.bytes, array.bytes,
                                 cudaMemcpyDefault, beside_));
    }
  }
  steps.Then(cuda::LaunchRaiseArrived(hangars_, receivers, flight.number, beside_))
      .Then(cudaEventRecord(flight.left, beside_));
  flying_.push_back(flight);
  return steps.Error();
}

std::string Flights::Take(const float* number, const std::vector<char*>& into,
                          cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (flying_.empty()) return "no copies are on their way";
  const Flight flight = flying_.front();
  flying_.pop_front();
  if (flight.bytes.size() != into.size()) return "other copies are on their way";
  Steps steps;
  // Not for later flights: one may wait until this one is taken.
  steps.Then(cudaStreamWaitEvent(stream, flight.left, 0))
      .Then(cuda::LaunchAwaitArrived(hangars_, flight.from, flight.number, stream));
  int64_t at = flight.begin;
  for (size_t i = 0; i < into.size(); ++i) {
    steps.Then(cuda::LaunchTake(hangars_, flight.from, flight.number, number, hangars_.own + at,
                                into[i], flight.bytes[i], stream));
    at += flight.bytes[i];
  }
  idle_.push_back(flight.left);
  return steps.Then(cuda::LaunchRaiseFreed(hangars_, flight.number, stream)).Error();
}

namespace {

ffi::Error FromMessage(const std::string& message) {
  if (message.empty()) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition, "lplb_jax: copies: " + message);
}

// The experts of an array `[slots, …]`, from expert `first` on.
struct Experts {
  char* data;
  int64_t slots;
  int64_t bytes;  // of one expert

  static Experts Of(const ffi::AnyBuffer& buffer) {
    const auto dims = buffer.dimensions();
    const int64_t slots = dims.size() == 0 ? 0 : dims[0];
    const auto bytes = static_cast<int64_t>(buffer.size_bytes());
    return {static_cast<char*>(buffer.untyped_data()), slots, slots == 0 ? 0 : bytes / slots};
  }
};

template <typename Run>
ffi::Error WithFlights(ffi::Dictionary attributes, int32_t ordinal, const Run& run) {
  return WithoutExceptions([&] {
    const auto comm = attributes.get<int64_t>("comm");
    if (comm.has_error()) return comm.error();
    const auto found = FindRank(*comm, ordinal);
    if (found.has_error()) return found.error();
    if (found->flights == nullptr)
      return Invalid("comm: it has no room for copies: pass copy_bytes");
    return run(*found->flights);
  });
}

ffi::Error Start(ffi::RemainingArgs arrays, ffi::Result<ffi::BufferR0<ffi::F32>> number,
                 ffi::Dictionary attributes, int32_t ordinal, cudaStream_t stream) {
  return WithFlights(attributes, ordinal, [&](Flights& flights) {
    const auto route = attributes.get<int64_t>("route");
    const auto n_copies = attributes.get<int64_t>("n_copies");
    const auto home = attributes.get<int64_t>("home");
    if (route.has_error() || n_copies.has_error() || home.has_error()) {
      return Invalid("start_flight: expected attributes route, n_copies and home");
    }
    std::vector<FlightArray> leave;
    for (size_t i = 0; i < arrays.size(); ++i) {
      const auto buffer = arrays.get<ffi::AnyBuffer>(i);
      if (buffer.has_error()) return buffer.error();
      const Experts experts = Experts::Of(*buffer);
      if (*n_copies < 1 || *n_copies > experts.slots || experts.bytes % 16 != 0) {
        return Invalid(
            "start_flight: expected at least n_copies experts of a multiple of 16 bytes");
      }
      // Copies of a rank's first experts leave; gradients of the copies in its last slots go home.
      const int64_t first = *home != 0 ? experts.slots - *n_copies : 0;
      leave.push_back({experts.data + first * experts.bytes, experts.bytes});
    }
    return FromMessage(flights.Start(*route, *home != 0, static_cast<int32_t>(*n_copies), leave,
                                     number->typed_data(), stream));
  });
}

ffi::Error Take(ffi::BufferR0<ffi::F32> number, ffi::RemainingArgs arrays,
                ffi::RemainingRets received, ffi::Dictionary attributes, int32_t ordinal,
                cudaStream_t stream) {
  return WithFlights(attributes, ordinal, [&](Flights& flights) {
    std::vector<char*> into;
    for (size_t i = 0; i < received.size(); ++i) {
      auto buffer = received.get<ffi::AnyBuffer>(i);
      if (buffer.has_error()) return buffer.error();
      into.push_back(static_cast<char*>((*buffer)->untyped_data()));
    }
    if (into.size() != arrays.size()) return Invalid("take_flight: expected a result per array");
    return FromMessage(flights.Take(number.typed_data(), into, stream));
  });
}

XLA_FFI_Error* StartFlight(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, Start,
                         ffi::Ffi::Bind()
                             .RemainingArgs()
                             .Ret<ffi::BufferR0<ffi::F32>>()
                             .Attrs<ffi::Dictionary>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .Ctx<ffi::PlatformStream<cudaStream_t>>());
  return handler(frame);
}

XLA_FFI_Error* TakeFlight(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, Take,
                         ffi::Ffi::Bind()
                             .Arg<ffi::BufferR0<ffi::F32>>()
                             .RemainingArgs()
                             .RemainingRets()
                             .Attrs<ffi::Dictionary>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .Ctx<ffi::PlatformStream<cudaStream_t>>());
  return handler(frame);
}

const Register start({"lplb_start_flight", StartFlight, InitializeComm});
const Register take({"lplb_take_flight", TakeFlight, InitializeComm});

}  // namespace
}  // namespace lplb
