// Copies of experts to other ranks by copy engines, beside XLA's stream.
//
// XLA takes the work of "lplb_start_flight" for done when the handler returns. So every array that
// leaves is an operand of "lplb_take_flight", too, and stays as it is until then. Neither target
// may be captured into a command buffer: a graph must not end between the two.
#include "xla_ffi/cuda/flight.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "xla_ffi/cuda/comm.h"
#include "xla_ffi/cuda/handler.h"

namespace lplb {
namespace {

constexpr int64_t RoundedUp(int64_t bytes) { return (bytes + 127) / 128 * 128; }
constexpr int64_t kHeaderBytes = RoundedUp(sizeof(cuda::HangarHeader));

// Each rank once.
cuda::FlightRanks Distinct(std::vector<int32_t> ranks) {
  std::sort(ranks.begin(), ranks.end());
  ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  cuda::FlightRanks distinct = {};
  for (const int32_t rank : ranks) distinct.of[distinct.n++] = rank;
  return distinct;
}

}  // namespace

int64_t Flights::HangarBytes(int64_t copy_bytes) {
  return kHeaderBytes + 2 * RoundedUp(copy_bytes);
}

Flights::Flights(const cuda::Peers& peers, const std::vector<uintptr_t>& hangars, int64_t bytes)
    : bytes_(bytes), table_(MakeDeviceMemory(hangars.size() * sizeof(char*))) {
  if (peers.size > cuda::HangarHeader::kMostRanks) {
    throw std::runtime_error("copies: more than 512 ranks");
  }
  for (const uintptr_t hangar : hangars) all_.push_back(reinterpret_cast<char*>(hangar));
  ThrowIf(
      cudaMemcpy(table_.get(), all_.data(), all_.size() * sizeof(char*), cudaMemcpyHostToDevice),
      "cudaMemcpy");
  hangars_ = {peers, static_cast<char* const*>(table_.get()), all_.at(peers.rank)};
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

Event Flights::TakeEvent() {
  if (idle_.empty()) return MakeEvent();
  Event event = std::move(idle_.back());
  idle_.pop_back();
  return event;
}

std::pair<Flights::Place, uint32_t> Flights::NextPlace(int64_t n_bytes) {
  if (cursor_ + n_bytes > bytes_) cursor_ = 0;
  if (cursor_ == 0) cursor_ = kHeaderBytes;
  const Place place = {++last_, cursor_, cursor_ + RoundedUp(n_bytes)};
  cursor_ = place.end;
  uint32_t before = forgotten_;
  for (const Place& earlier : placed_) {
    if (earlier.begin < place.end && place.begin < earlier.end) before = earlier.number;
  }
  placed_.push_back(place);
  if (placed_.size() > kMostPlaced) {
    forgotten_ = placed_.front().number;
    placed_.pop_front();
  }
  return {place, before};
}

std::string Flights::Start(int64_t route, bool against, int32_t n_copies,
                           const std::vector<FlightArray>& arrays, float* number,
                           cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (route >= static_cast<int64_t>(routes_.size())) return "unknown topology";
  const FlightRoute& along = routes_[route];
  const std::vector<int32_t>& to = against ? along.from : along.to;
  const cuda::FlightRanks receivers = Distinct(to);
  std::vector<int64_t> bytes;
  int64_t total = 0;
  for (const FlightArray& array : arrays) {
    bytes.push_back(n_copies * array.bytes);
    total += bytes.back();
  }
  if (kHeaderBytes + total > bytes_) {
    return "comm: it has room for " + std::to_string(bytes_ - kHeaderBytes) +
           " bytes of copies, and this call needs " + std::to_string(total) +
           "; raise copy_bytes in init_comm";
  }
  const auto [place, before] = NextPlace(total);
  Flight flight = {place, bytes, Distinct(against ? along.to : along.from), TakeEvent()};
  const cudaStream_t beside = beside_.get();
  // Nothing must leave where a step before it fails: it might get over what was not taken yet.
  ThrowIf(cuda::LaunchNumber(place.number, number, stream), "copies: number");
  ThrowIf(cudaEventRecord(fork_.get(), stream), "cudaEventRecord");
  ThrowIf(cudaStreamWaitEvent(beside, fork_.get(), 0), "cudaStreamWaitEvent");
  ThrowIf(cuda::LaunchAwaitFreed(hangars_, receivers, before, beside), "copies: await");
  int64_t at = place.begin;
  for (const FlightArray& array : arrays) {
    for (int32_t copy = 0; copy < n_copies; ++copy, at += array.bytes) {
      char* there = all_[to[copy % to.size()]] + at;
      ThrowIf(cudaMemcpyAsync(there, array.data + copy * array.bytes, array.bytes,
                              cudaMemcpyDefault, beside),
              "cudaMemcpyAsync");
    }
  }
  ThrowIf(cuda::LaunchRaiseArrived(hangars_, receivers, place.number, beside), "copies: raise");
  ThrowIf(cudaEventRecord(flight.left.get(), beside), "cudaEventRecord");
  flying_.push_back(std::move(flight));
  return "";
}

std::string Flights::Take(const float* number, const std::vector<FlightResult>& into,
                          cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (flying_.empty()) return "no copies are on their way";
  Flight flight = std::move(flying_.front());
  flying_.pop_front();
  const auto same = [](int64_t bytes, const FlightResult& result) { return bytes == result.bytes; };
  if (!std::equal(flight.bytes.begin(), flight.bytes.end(), into.begin(), into.end(), same)) {
    return "other copies are on their way";
  }
  // Not for later flights: one may wait until this one is taken.
  ThrowIf(cudaStreamWaitEvent(stream, flight.left.get(), 0), "cudaStreamWaitEvent");
  idle_.push_back(std::move(flight.left));
  const uint32_t which = flight.place.number;
  ThrowIf(cuda::LaunchAwaitArrived(hangars_, flight.from, which, stream), "copies: await");
  int64_t at = flight.place.begin;
  for (const FlightResult& result : into) {
    ThrowIf(cuda::LaunchTake(hangars_, which, number, hangars_.own + at, result.data, result.bytes,
                             stream),
            "copies: take");
    at += result.bytes;
  }
  ThrowIf(cuda::LaunchRaiseFreed(hangars_, which, stream), "copies: raise");
  return "";
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
    std::vector<FlightResult> into;
    for (size_t i = 0; i < received.size(); ++i) {
      auto buffer = received.get<ffi::AnyBuffer>(i);
      if (buffer.has_error()) return buffer.error();
      into.push_back({static_cast<char*>((*buffer)->untyped_data()),
                      static_cast<int64_t>((*buffer)->size_bytes())});
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
