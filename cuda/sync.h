// How ranks share their counts: pointers, sizes and a stream in, cudaError_t out.
#ifndef LPLB_CUDA_SYNC_H_
#define LPLB_CUDA_SYNC_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lplb::cuda {

// What one rank keeps between calls, in device memory. Initially zero. Calls on one communicator
// run in order on a device, so nothing else changes it while a kernel runs.
struct SyncState {
  uint32_t epoch;   // calls so far
  uint32_t ticket;  // blocks that have counted; 0 between calls
  int32_t failed;   // sticky: after a failure nobody waits
};

enum class SyncFailure : int32_t {
  kNone = 0,
  kTimeout = 1,
  kWrongRank = 2,
  kNoTokens = 3,
  kNoCopies = 4,
  kWrongFlight = 5,
  kPeerFailed = 6
};

// The first failure, in pinned host memory.
struct SyncReport {
  int32_t failure;  // a SyncFailure, written last
  int32_t rank;     // the rank that waited
  int32_t peer;     // the rank waited for; with kWrongRank, this rank's number in the program
  uint32_t epoch;   // the call
};

// How a kernel reaches the ranks of its group. It does not change between calls, so a launch may be
// captured.
//
// An inbox is [2, size, stride] of 64-bit words, each an epoch above a count: two slots with a row
// per rank. A word is written at once, so a rank that sees the awaited epoch has the count. Two
// slots suffice, used in turn: a rank writes epoch e + 2 only after it has received e + 1 from all
// ranks, and they send e + 1 only once they are done with e.
//
// A rank that has failed sends ~e for every epoch e from then on. Nobody takes such a word for a
// count, and who awaits one fails, too, without waiting any longer.
struct Peers {
  const uint64_t* inbox;     // this rank's own
  uint64_t* const* inboxes;  // [size], in device memory; this rank's own is one of them
  SyncState* state;
  SyncReport* report;
  int64_t timeout_ns;
  int32_t rank;
  int32_t size;
  int32_t stride;
};

inline int64_t InboxBytes(int32_t size, int32_t stride) { return 2 * int64_t{8} * size * stride; }

// What the put kernel needs in addition, where peers cannot be mapped. All but `pes` is on the
// symmetric heap.
struct PutPeers {
  uint64_t* inbox;     // this rank's own: the same object in every process
  uint64_t* staging;   // [2, stride], words in flight
  uint64_t* signals;   // [size], per rank the last epoch that has arrived completely
  const int32_t* pes;  // [size], in device memory
};

// matrix [size, n]: every rank's counts [n], n ≤ stride. `rank` [] is checked against peers.rank.
// After a failure the matrix is −1.
cudaError_t LaunchSync(const Peers& peers, const int32_t* rank, const int32_t* counts, int32_t n,
                       int32_t* matrix, cudaStream_t stream);

// The same with `kernel` of nvshmem/sync_put.cu. peers.inboxes is null for a peer that is not
// mapped.
cudaError_t LaunchSyncPut(const void* kernel, const Peers& peers, const PutPeers& put,
                          const int32_t* rank, const int32_t* counts, int32_t n, int32_t* matrix,
                          cudaStream_t stream);

// Loads the kernels. Loading them later, while another kernel waits for its peers, can block the
// driver.
cudaError_t PreloadSync();

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_SYNC_H_
