#include "xla_ffi/module.h"

#include <nanobind/stl/array.h>

#include <array>

#include "cuda/ipm.h"
#include "cuda/solver.h"
#include "xla_ffi/cuda/handlers.h"

namespace lplb {
namespace {

using Pointer = uintptr_t;

template <typename T>
T* As(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);
}

// The solver's launcher on raw device pointers and a raw stream, for benchmarks that time kernels
// without XLA around them.
void LaunchSolve(std::array<int32_t, 6> problem, std::array<int32_t, 2> sources, int64_t batch,
                 std::array<Pointer, 4> in, std::array<Pointer, 4> out, Pointer stream) {
  const Problem p = {problem[0], problem[1], problem[2], problem[3], problem[4], problem[5]};
  const SolveOperands operands = {As<const int32_t>(in[0]), As<const int32_t>(in[1]),
                                  As<const int32_t>(in[2]), As<const int32_t>(in[3])};
  const SolveResults results = {As<int32_t>(out[0]), As<int32_t>(out[1]), As<int32_t>(out[2]),
                                As<int32_t>(out[3])};
  const cudaError_t error = cuda::LaunchSolve(p, {sources[0], sources[1]}, batch, operands, results,
                                              As<CUstream_st>(stream));
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Likewise for the interior point; `in` has the weights last, `options` are floats, weighted,
// repair.
void LaunchIpm(std::array<int32_t, 6> problem, std::array<int32_t, 2> sources,
               std::array<bool, 3> options, int64_t batch, std::array<Pointer, 5> in,
               std::array<Pointer, 4> out, int variant, Pointer stream) {
  const Problem p = {problem[0], problem[1], problem[2], problem[3], problem[4], problem[5]};
  const IpmOperands operands = {{As<const int32_t>(in[0]), As<const int32_t>(in[1]),
                                 As<const int32_t>(in[2]), As<const int32_t>(in[3])},
                                As<const float>(in[4])};
  const SolveResults results = {As<int32_t>(out[0]), As<int32_t>(out[1]), As<int32_t>(out[2]),
                                As<int32_t>(out[3])};
  const cudaError_t error =
      cuda::LaunchIpm(p, {sources[0], sources[1]}, {options[0], options[1], options[2]}, batch,
                      operands, results, variant, As<CUstream_st>(stream));
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace
}  // namespace lplb

NB_MODULE(_cuda, m) {
  lplb::DefineModule(m, {lplb::CountCuda, lplb::SolveCuda, lplb::IpmCuda, lplb::AssignCuda});
  m.def("launch_solve", lplb::LaunchSolve);
  m.def("launch_ipm", lplb::LaunchIpm);
}
