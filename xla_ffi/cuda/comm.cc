#include "xla_ffi/cuda/comm.h"

#include <cuda_runtime_api.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/exchange_plan.h"
#include "cuda/journeys.h"
#include "cuda/route.h"
#include "xla_ffi/cuda/handler.h"
#include "xla_ffi/cuda/resources.h"

namespace lplb {
namespace {

// A device's part in a communicator, and what it owns.
struct Attached {
  CommRank rank;
  DeviceMemory state;
  DeviceMemory exchange_state;
  PinnedMemory report;
};

// Ranks by communicator and device. Guarded, since a program may run while another communicator is
// made.
std::mutex mutex;
// Never destroyed: when the process ends, CUDA is gone.
auto& all_ranks = *new std::map<std::pair<int64_t, int32_t>, Attached>;

// While `mutex` is held.
Attached& AttachedOf(int64_t id, int32_t device) {
  const auto found = all_ranks.find({id, device});
  if (found != all_ranks.end()) return found->second;
  throw std::runtime_error("comm: device " + std::to_string(device) + " is not attached");
}

// CUDA's calls may wait for a kernel that waits for other ranks, whose handlers need `mutex`. So it
// is not held meanwhile.
CommRank RankOf(int64_t id, int32_t device) {
  const std::lock_guard<std::mutex> lock(mutex);
  return AttachedOf(id, device).rank;
}

std::string MessageOf(const cuda::SyncReport& report, int64_t timeout_ns) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  const std::string remedy =
      "; results since then mean nothing. Close this communicator and make a new one";
  switch (static_cast<cuda::SyncFailure>(report.failure)) {
    case cuda::SyncFailure::kNone:
      return "";
    case cuda::SyncFailure::kTimeout:
      return "lplb_jax: rank " + number(report.rank) + " waited " + number(timeout_ns / 1000000) +
             " ms in vain for the counts of rank " + number(report.peer) + " (call " +
             number(report.epoch) + " of the communicator)" + remedy;
    case cuda::SyncFailure::kNoTokens:
      return "lplb_jax: rank " + number(report.rank) + " waited " + number(timeout_ns / 1000000) +
             " ms in vain for the tokens of rank " + number(report.peer) + " (exchange " +
             number(report.epoch) + " of the communicator)" + remedy;
    case cuda::SyncFailure::kNoCopies:
      return "lplb_jax: rank " + number(report.rank) + " waited " + number(timeout_ns / 1000000) +
             " ms in vain for copies of experts with rank " + number(report.peer) + " (flight " +
             number(report.epoch) + " of the communicator)" + remedy;
    case cuda::SyncFailure::kWrongFlight:
      return "lplb_jax: rank " + number(report.rank) +
             " takes copies of experts in another order than they left (flight " +
             number(report.epoch) + " of the communicator)" + remedy;
    case cuda::SyncFailure::kWrongRank:
      return "lplb_jax: comm: the program takes rank " + number(report.rank) + " for rank " +
             number(report.peer) + ": use the mesh that the communicator was made with" + remedy;
    case cuda::SyncFailure::kPeerFailed:
      return "lplb_jax: rank " + number(report.rank) + " needs counts, tokens or copies of rank " +
             number(report.peer) + ", which has failed" + remedy;
  }
  return "lplb_jax: comm: unknown failure";
}

// The first failure reported by a rank of this process.
std::string FailureOf(int64_t id) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [key, found] : all_ranks) {
    const cuda::Peers& peers = found.rank.peers;
    const volatile cuda::SyncReport* report = peers.report;
    if (key.first != id || report->failure == 0) continue;
    return MessageOf({report->failure, report->rank, report->peer, report->epoch},
                     peers.timeout_ns);
  }
  return "";
}

bool IsOpen(int64_t id) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto first = all_ranks.lower_bound({id, 0});
  return first != all_ranks.end() && first->first.first == id;
}

// A recorded program holds addresses that are no longer valid once the communicator is closed.
ffi::Error CheckComm(int64_t id) {
  if (!IsOpen(id)) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                      "lplb_jax: comm: it was closed; trace the program anew with another one");
  }
  const std::string failure = FailureOf(id);
  if (failure.empty()) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kDeadlineExceeded, failure);
}

void ClearMemory(int device, uintptr_t memory, int64_t bytes) {
  const DeviceScope scope(device);
  Clear(reinterpret_cast<void*>(memory), bytes);
}

bool CanAccess(int device, int peer) {
  int can = 0;
  ThrowIf(cudaDeviceCanAccessPeer(&can, device, peer), "cudaDeviceCanAccessPeer");
  return can != 0;
}

void EnablePeer(int device, int peer) {
  const DeviceScope scope(device);
  const cudaError_t error = cudaDeviceEnablePeerAccess(peer, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();  // The next launch must not find this error.
    return;
  }
  ThrowIf(error, "cudaDeviceEnablePeerAccess");
}

// What Attach allocates on a device: the state, then the inboxes and PEs of all ranks.
constexpr int64_t kStateBytes = 64;
static_assert(sizeof(cuda::SyncState) <= kStateBytes);

template <typename T>
T* CopyToDevice(const std::vector<T>& from, void* to) {
  ThrowIf(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice),
          "cudaMemcpy");
  return static_cast<T*>(to);
}

void* Behind(const DeviceMemory& state) { return static_cast<char*>(state.get()) + kStateBytes; }

// Makes a device rank `rank` of communicator `id`. inboxes[r] is rank r's inbox.
void Attach(int64_t id, int device, int32_t rank, const std::vector<uintptr_t>& inboxes,
            int32_t stride, double timeout_s) {
  const DeviceScope scope(device);
  ThrowIf(cuda::PreloadSync(), "loading the kernels");
  ThrowIf(cuda::PreloadSyncedRebalance(), "loading the kernels");
  const int64_t table_bytes = inboxes.size() * (sizeof(uintptr_t) + sizeof(int32_t));
  Attached made = {{},
                   MakeDeviceMemory(kStateBytes + table_bytes),
                   nullptr,
                   MakePinnedMemory(sizeof(cuda::SyncReport))};
  cuda::Peers& peers = made.rank.peers;
  peers.state = static_cast<cuda::SyncState*>(made.state.get());
  peers.inbox = reinterpret_cast<const uint64_t*>(inboxes.at(rank));
  peers.inboxes = reinterpret_cast<uint64_t* const*>(CopyToDevice(inboxes, Behind(made.state)));
  peers.report = static_cast<cuda::SyncReport*>(made.report.get());
  *peers.report = {};
  peers.timeout_ns = static_cast<int64_t>(timeout_s * 1e9);
  peers.rank = rank;
  peers.size = static_cast<int32_t>(inboxes.size());
  peers.stride = stride;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [key, found] : all_ranks) {
    if (key.first != id || (key.second != device && found.rank.peers.inbox != peers.inbox))
      continue;
    throw std::runtime_error("comm: device " + std::to_string(key.second) + " is already rank " +
                             std::to_string(found.rank.peers.rank) + " of communicator " +
                             std::to_string(id) + "; close that before device " +
                             std::to_string(device) + " becomes its rank " + std::to_string(rank));
  }
  all_ranks.emplace(std::pair(id, device), std::move(made));
}

// Loads a file of kernels, which NVSHMEM then initializes with its state.
uintptr_t LoadLibrary(int device, const std::string& path) {
#if CUDART_VERSION >= 12080
  const DeviceScope scope(device);
  cudaLibrary_t library;
  ThrowIf(cudaLibraryLoadFromFile(&library, path.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0),
          path);
  return reinterpret_cast<uintptr_t>(library);
#else
  throw std::runtime_error(path + ": lplb_jax was built with a CUDA older than 12.8");
#endif
}

// A kernel of what LoadLibrary returned, ready to be launched on the current device.
const void* KernelOf(uintptr_t library, const std::string& name) {
#if CUDART_VERSION >= 12080
  cudaKernel_t found;
  ThrowIf(cudaLibraryGetKernel(&found, reinterpret_cast<cudaLibrary_t>(library), name.c_str()),
          name);
  const auto kernel = reinterpret_cast<const void*>(found);
  cudaFuncAttributes attributes;
  ThrowIf(cudaFuncGetAttributes(&attributes, kernel), name);
  return kernel;
#else
  throw std::runtime_error(name + ": lplb_jax was built with a CUDA older than 12.8");
#endif
}

// Lets an attached rank reach the peers whose inbox is 0 through the put kernel of `library`.
void AttachPut(int64_t id, int device, uintptr_t library, const std::vector<int32_t>& pes,
               uintptr_t inbox, uintptr_t staging, uintptr_t signals) {
  const DeviceScope scope(device);
  const void* kernel = KernelOf(library, "lplb_sync_put");
  const cuda::Peers peers = RankOf(id, device).peers;
  const int32_t* table = CopyToDevice(pes, const_cast<uint64_t**>(peers.inboxes + peers.size));
  const std::lock_guard<std::mutex> lock(mutex);
  CommRank& made = AttachedOf(id, device).rank;
  made.put = {reinterpret_cast<uint64_t*>(inbox), reinterpret_cast<uint64_t*>(staging),
              reinterpret_cast<uint64_t*>(signals), table};
  made.put_kernel = kernel;
}

// Device memory that peers write to, cleared. Freed with this object.
class Window {
 public:
  Window(int device, int64_t bytes) : device_(device) {
    const DeviceScope scope(device);
    memory_ = MakeDeviceMemory(bytes);
  }
  // Python's, so it holds the GIL. Other threads may need it to launch what the device waits for.
  ~Window() {
    const nanobind::gil_scoped_release others_run;
    int former = 0;
    cudaGetDevice(&former);
    cudaSetDevice(device_);
    memory_.reset();
    cudaSetDevice(former);
  }
  Window(const Window&) = delete;

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(memory_.get()); }

 private:
  int device_;
  DeviceMemory memory_;
};

// In the order of WindowSizes.
using WindowArgument = std::array<int32_t, 4>;

cuda::WindowSizes SizesOf(const WindowArgument& shape) {
  return {shape[0], shape[1], shape[2], shape[3]};
}

template <typename Shape>
int64_t WindowBytes(const WindowArgument& shape) {
  return Shape{SizesOf(shape)}.Bytes();
}

// An Exchange or PutExchange of a rank, and the memory of its state. windows[r] is what the rank
// takes for rank r's window.
template <typename Made>
std::pair<Made, DeviceMemory> MakeExchange(const cuda::Peers& peers,
                                           const std::vector<uintptr_t>& windows,
                                           const WindowArgument& shape) {
  ThrowIf(cuda::PreloadPlan(), "loading the kernels");
  ThrowIf(cuda::PreloadJourneys(), "loading the kernels");
  static_assert(sizeof(cuda::ExchangeState) <= kStateBytes);
  DeviceMemory state = MakeDeviceMemory(kStateBytes + windows.size() * sizeof(uintptr_t));
  Made made = {};
  made.peers = peers;
  made.shape = {SizesOf(shape)};
  made.state = static_cast<cuda::ExchangeState*>(state.get());
  made.windows = reinterpret_cast<char* const*>(CopyToDevice(windows, Behind(state)));
  return {made, std::move(state)};
}

// Lets an attached rank exchange tokens. windows[r] is rank r's window, cleared.
void AttachWindows(int64_t id, int device, const std::vector<uintptr_t>& windows,
                   const WindowArgument& shape) {
  const DeviceScope scope(device);
  ThrowIf(cuda::PreloadExchange(), "loading the kernels");
  auto [exchange, state] = MakeExchange<cuda::Exchange>(RankOf(id, device).peers, windows, shape);
  const std::lock_guard<std::mutex> lock(mutex);
  Attached& made = AttachedOf(id, device);
  made.rank.exchange = exchange;
  made.exchange_state = std::move(state);
}

// The same after AttachPut, by kernels of `library`. This rank's `window`, cleared, is on the
// symmetric heap.
void AttachPutWindows(int64_t id, int device, uintptr_t library, uintptr_t window,
                      const WindowArgument& shape) {
  const DeviceScope scope(device);
  PutKernels kernels = {KernelOf(library, "lplb_there_put"), {}};
  constexpr const char* kTypes[] = {"bfloat16", "float16", "float32", "float64"};
  static_assert(std::size(kTypes) == cuda::kRowTypes);
  for (size_t type = 0; type < std::size(kTypes); ++type) {
    kernels.back[type] = KernelOf(library, std::string("lplb_back_put_") + kTypes[type]);
  }
  const std::vector<uintptr_t> windows(shape[0], window);
  auto [exchange, state] =
      MakeExchange<cuda::PutExchange>(RankOf(id, device).peers, windows, shape);
  const std::lock_guard<std::mutex> lock(mutex);
  Attached& made = AttachedOf(id, device);
  made.rank.put_kernels = kernels;
  made.rank.put_exchange = exchange;
  made.rank.put_exchange.pes = made.rank.put.pes;
  made.exchange_state = std::move(state);
}

// Lets an attached rank send copies of experts. hangars[r] is rank r's hangar of `bytes`, cleared.
void AttachHangars(int64_t id, int device, const std::vector<uintptr_t>& hangars, int64_t bytes) {
  const DeviceScope scope(device);
  ThrowIf(cuda::PreloadFlights(), "loading the kernels");
  auto flights = std::make_shared<Flights>(RankOf(id, device).peers, hangars, bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  AttachedOf(id, device).rank.flights = std::move(flights);
}

// Which ranks a device's rank sends copies to and receives them from, by columns of a topology.
int64_t AddRoute(int64_t id, int device, const std::vector<int32_t>& to,
                 const std::vector<int32_t>& from) {
  const std::shared_ptr<Flights> flights = RankOf(id, device).flights;
  if (flights == nullptr) throw std::runtime_error("comm: it has no room for copies");
  return flights->AddRoute({to, from});
}

// Forgets communicator `id` and, once the devices are done with it, frees what Attach allocated.
void Detach(int64_t id) {
  std::vector<std::pair<int32_t, Attached>> found;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto it = all_ranks.begin(); it != all_ranks.end();) {
      if (it->first.first == id) {
        found.emplace_back(it->first.second, std::move(it->second));
        it = all_ranks.erase(it);
      } else {
        ++it;
      }
    }
  }
  for (auto& [device, attached] : found) {
    const DeviceScope scope(device);
    ThrowIf(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    attached = {};
  }
}

}  // namespace

ffi::ErrorOr<CommRank> FindRank(int64_t id, int32_t device) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = all_ranks.find({id, device});
  if (found != all_ranks.end()) return found->second.rank;
  return ffi::Unexpected(ffi::Error(
      ffi::ErrorCode::kFailedPrecondition,
      "lplb_jax: comm: it was closed, or device " + std::to_string(device) +
          " is not of its mesh; run the program with the mesh that init_comm was given"));
}

XLA_FFI_Error* InitializeComm(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(
      handler,
      [](ffi::Dictionary attributes, ffi::RemainingArgs, ffi::RemainingRets) {
        return WithoutExceptions([&] {
          const auto id = attributes.get<int64_t>("comm");
          return id.has_error() ? id.error() : CheckComm(*id);
        });
      },
      ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
          .Attrs<ffi::Dictionary>()
          .RemainingArgs()
          .RemainingRets());
  return handler(frame);
}

void DefineComm(nanobind::module_& m) {
  // Other threads may have to launch what these calls wait for.
  const nanobind::call_guard<nanobind::gil_scoped_release> others_run;
  m.def("comm_clear", ClearMemory, others_run);
  m.def("comm_can_access", CanAccess, others_run);
  m.def("comm_enable_peer", EnablePeer, others_run);
  m.def("comm_inbox_bytes", cuda::InboxBytes);
  m.def("comm_attach", Attach, others_run);
  m.def("comm_attach_put", AttachPut, others_run);
  m.def("comm_window_bytes", WindowBytes<cuda::WindowShape>);
  m.def("comm_attach_windows", AttachWindows, others_run);
  m.def("comm_put_window_bytes", WindowBytes<cuda::PutWindowShape>);
  m.def("comm_attach_put_windows", AttachPutWindows, others_run);
  m.def("comm_hangar_bytes", Flights::HangarBytes);
  m.def("comm_attach_hangars", AttachHangars, others_run);
  m.def("comm_add_route", AddRoute, others_run);
  nanobind::class_<Window>(m, "Window")
      .def(nanobind::init<int, int64_t>(), others_run)
      .def_prop_ro("address", &Window::address);
  m.def("comm_load_library", LoadLibrary, others_run);
  m.def("comm_detach", Detach, others_run);
  m.def("comm_failure", FailureOf, others_run);
  // Makes a device's context current in this thread.
  m.def(
      "comm_use_device",
      [](int device) {
        ThrowIf(cudaSetDevice(device), "cudaSetDevice");
        ThrowIf(cudaFree(nullptr), "cudaFree");
      },
      others_run);
}

}  // namespace lplb
