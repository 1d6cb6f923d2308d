// rebalance with other ranks: the launches of balancer.cu, with the exchange of counts in them.
#include "cuda/route/launch.cuh"

namespace lplb::cuda {
namespace {

template <typename Kernel>
cudaError_t Preload(Kernel kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

}  // namespace

cudaError_t LaunchSyncedRebalance(const RouteArguments& arguments, cudaStream_t stream) {
  return WithSolverShape(arguments.problem, [&](auto shape) {
    return LaunchRoute<decltype(shape)::kWords, decltype(shape)::kColumns, Quotas::kSynced>(
        arguments, stream);
  });
}

cudaError_t PreloadSyncedRebalance() {
  cudaError_t error = Preload(TileCountKernel<Quotas::kSynced>);
  // Every shape that WithSolverShape knows.
  for (const int32_t ranks : {32, 64, 128}) {
    for (int32_t columns = 1; columns <= 5 && error == cudaSuccess; ++columns) {
      error = WithSolverShape(Problem(ranks, ranks, columns, ranks, ranks, 2), [](auto shape) {
        constexpr int kWords = decltype(shape)::kWords;
        constexpr int kColumns = decltype(shape)::kColumns;
        const cudaError_t failed = Preload(ClusterKernel<kWords, kColumns, Quotas::kSynced>);
        return failed != cudaSuccess ? failed
                                     : Preload(TileRouteKernel<kWords, kColumns, Quotas::kSynced>);
      });
    }
  }
  return error;
}

}  // namespace lplb::cuda
