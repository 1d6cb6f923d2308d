// Messages between the blocks of a cluster: stores to another block's shared memory that a barrier
// there counts in bytes, so that their arrival needs no barrier of the whole cluster.
#ifndef LPLB_CUDA_CLUSTER_CUH_
#define LPLB_CUDA_CLUSTER_CUH_

#include <cstdint>

namespace lplb::cuda {

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Prepares `arrivals`. One thread calls it, before its block announces that it has started.
__device__ __forceinline__ void InitArrivals(uint64_t* arrivals) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n"
      "fence.mbarrier_init.release.cluster;" ::"r"(SharedAddress(arrivals))
      : "memory");
}

// The barrier at which the blocks of a cluster announce that they have started and may be sent to:
// all threads arrive, in whole warps. It orders no other memory accesses, for which the kernel
// would have to wait.
__device__ __forceinline__ void AnnounceStart() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void AwaitStarts() {
  asm volatile("barrier.cluster.wait;" ::: "memory");
}

// Stores `value` to `to` in block `block`'s shared memory and counts it in `arrivals` there. Both
// are given as addresses in this block.
__device__ __forceinline__ void SendTo(int32_t block, void* to, const uint4& value,
                                       uint64_t* arrivals) {
  asm volatile(
      "{\n .reg .b32 to, arrivals;\n"
      " mapa.shared::cluster.u32 to, %0, %2;\n"
      " mapa.shared::cluster.u32 arrivals, %1, %2;\n"
      " st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, "
      "[arrivals];\n}" ::"r"(SharedAddress(to)),
      "r"(SharedAddress(arrivals)), "r"(block), "r"(value.x), "r"(value.y), "r"(value.z),
      "r"(value.w)
      : "memory");
}

// Says how many bytes `arrivals` waits for, once. One thread calls it, before or while they come.
__device__ __forceinline__ void ExpectBytes(uint64_t* arrivals, int32_t bytes) {
  asm volatile(
      "{\n .reg .b64 state;\n"
      " mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
          SharedAddress(arrivals)),
      "r"(bytes)
      : "memory");
}

// Waits until they all have come. They are in this block's memory: its own scope suffices.
__device__ __forceinline__ void AwaitBytes(uint64_t* arrivals) {
  const uint32_t address = SharedAddress(arrivals);
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address)
        : "memory");
  }
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_CLUSTER_CUH_
