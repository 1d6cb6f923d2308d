// What CUDA lends to the host: each thing is given back with the object that owns it.
#ifndef LPLB_XLA_FFI_CUDA_RESOURCES_H_
#define LPLB_XLA_FFI_CUDA_RESOURCES_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace lplb {

inline void ThrowIf(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

// Makes a device current, and restores the previous one at the end.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    ThrowIf(cudaGetDevice(&former_), "cudaGetDevice");
    ThrowIf(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
  }
  ~DeviceScope() { cudaSetDevice(former_); }
  DeviceScope(const DeviceScope&) = delete;

 private:
  int former_ = 0;
};

template <auto kFree>
struct FreeBy {
  template <typename T>
  void operator()(T* owned) const {
    kFree(owned);
  }
};

using DeviceMemory = std::unique_ptr<void, FreeBy<cudaFree>>;
using PinnedMemory = std::unique_ptr<void, FreeBy<cudaFreeHost>>;
using Stream = std::unique_ptr<CUstream_st, FreeBy<cudaStreamDestroy>>;
using Event = std::unique_ptr<CUevent_st, FreeBy<cudaEventDestroy>>;

inline void Clear(void* memory, int64_t bytes) {
  ThrowIf(cudaMemset(memory, 0, bytes), "cudaMemset");
  ThrowIf(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

// These are of the current device. Memory is cleared.
inline DeviceMemory MakeDeviceMemory(int64_t bytes) {
  void* memory = nullptr;
  ThrowIf(cudaMalloc(&memory, bytes), "cudaMalloc");
  DeviceMemory made(memory);
  Clear(memory, bytes);
  return made;
}

inline PinnedMemory MakePinnedMemory(int64_t bytes) {
  void* memory = nullptr;
  ThrowIf(cudaHostAlloc(&memory, bytes, cudaHostAllocPortable), "cudaHostAlloc");
  return PinnedMemory(memory);
}

inline Stream MakeStream() {
  cudaStream_t made = nullptr;
  ThrowIf(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "cudaStreamCreate");
  return Stream(made);
}

inline Event MakeEvent() {
  cudaEvent_t made = nullptr;
  ThrowIf(cudaEventCreateWithFlags(&made, cudaEventDisableTiming), "cudaEventCreate");
  return Event(made);
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CUDA_RESOURCES_H_
