#include "xla_ffi/cuda/limits.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>

#include "cuda/batch_copies.h"
#include "cuda/device.h"
#include "cuda/exchange_plan.h"
#include "cuda/graph_solver.h"
#include "cuda/route/shape.h"
#include "cuda/solver.h"
#include "xla_ffi/cuda/handler.h"

namespace lplb {
namespace {

namespace nb = nanobind;

// Why a problem is refused; empty if it is not.
using Refusal = std::string;

std::string Number(int64_t number) { return std::to_string(number); }

std::string GroupsOf(const Problem& p) {
  return "groups of " + Number(p.group_size) + " ranks with " + Number(p.n_columns) +
         " columns and " + Number(p.n_local) + " experts each";
}

Refusal NeedsMemory(const std::string& what, int64_t bytes, const cuda::Device& device,
                    const std::string& remedy) {
  if (bytes <= device.shared_bytes) return "";
  return what + " need " + Number(bytes) + " bytes of a block's shared memory, and this GPU (" +
         "compute capability " + Number(device.capability / 10) + "." +
         Number(device.capability % 10) + ") has " + Number(device.shared_bytes) + ": " + remedy;
}

// A placement without a topology is solved as one group of all ranks.
bool IsAnywhere(const Problem& p) { return p.n_columns == 0; }

Refusal TooManyRanks(const Problem& p) {
  if (p.ep_size <= cuda::kMaxRanksAnywhere) return "";
  return "placement: without a topology, the CUDA kernels take at most " +
         Number(cuda::kMaxRanksAnywhere) + " ranks, got " + Number(p.ep_size) +
         ": use a topology, or the CPU";
}

std::string ExpertsInSlots(const Problem& p) {
  return Number(p.n_logical) + " experts in " + Number(p.n_physical) + " slots on " +
         Number(p.ep_size) + " ranks";
}

std::string SizesOf(const Problem& p) {
  return "n_logical = " + Number(p.n_logical) + " and n_physical = " + Number(p.n_physical);
}

// For kernels that store experts and slots in 16 bits.
Refusal TooManySlots(const Problem& p) {
  if (p.n_logical <= cuda::kMaxExperts && p.n_physical <= cuda::kMaxSlots) return "";
  return "the CUDA kernels take at most " + Number(cuda::kMaxExperts) + " experts and " +
         Number(cuda::kMaxSlots) + " slots, got " + SizesOf(p) +
         ": use fewer experts and redundant slots, or the CPU";
}

Refusal RefuseSolveAnywhere(const Problem& p, int64_t bytes, const cuda::Device& device) {
  if (const Refusal refusal = TooManyRanks(p); !refusal.empty()) return refusal;
  return NeedsMemory("placement: in the CUDA solver, " + ExpertsInSlots(p), bytes, device,
                     "use fewer experts or slots, a larger GPU, or the CPU");
}

// `bytes` is the shared memory per block.
Refusal RefuseSolve(const Problem& p, int64_t bytes, const cuda::Device& device) {
  if (IsAnywhere(p)) return RefuseSolveAnywhere(p, bytes, device);
  if (p.group_size > cuda::kMaxGroupSize) {
    return "r2o: the CUDA solver takes groups of at most " + Number(cuda::kMaxGroupSize) +
           " ranks, got " + Number(p.group_size) + ": use smaller groups, or the CPU";
  }
  return NeedsMemory("r2o: in the CUDA solver, " + GroupsOf(p), bytes, device,
                     "use fewer columns or experts, a larger GPU, or the CPU");
}

Refusal RefuseRoute(const Problem& p, cuda::Quotas quotas, bool chooses, int64_t n_tokens,
                    const cuda::Device& device) {
  if (p.node_size > 0) {
    if (const Refusal refusal = TooManyRanks(p); !refusal.empty()) return refusal;
  }
  if (const Refusal refusal = TooManySlots(p); !refusal.empty()) return refusal;
  // The blocks of a cluster share the choice of copies, so each may need less than a block alone.
  if (cuda::ChooseShape(p, quotas, chooses, n_tokens, device).threads > 0) return "";
  return NeedsMemory("the tables of " + SizesOf(p) + " on " + Number(p.ep_size) + " ranks",
                     cuda::LeastSharedBytes(p, quotas, chooses), device,
                     "use fewer experts or redundant slots, a larger GPU, or the CPU");
}

Refusal RefuseCopies(const Problem& p, const cuda::Device& device) {
  if (const Refusal refusal = TooManyRanks(p); !refusal.empty()) return refusal;
  if (const Refusal refusal = TooManySlots(p); !refusal.empty()) return refusal;
  return NeedsMemory("placement: to choose copies, " + ExpertsInSlots(p), cuda::PlaceCopiesBytes(p),
                     device, "use fewer experts or slots, a larger GPU, or the CPU");
}

Refusal RefuseIpmAnywhere(const Problem& p, const IpmOptions& options, const cuda::Device& device) {
  if (p.ep_size > cuda::kMaxGroupSize) {
    return "placement: without a topology, the CUDA interior point takes at most " +
           Number(cuda::kMaxGroupSize) + " ranks, got " + Number(p.ep_size) +
           ": use solver='exact', a topology, or the CPU";
  }
  if (options.cusolverdx) {
    return "factor: expected 'elimination' for a placement without a topology, got 'cusolverdx'";
  }
  return NeedsMemory("placement: in the CUDA interior point, " + ExpertsInSlots(p),
                     cuda::IpmSharedBytes(p, options), device,
                     "use fewer experts or slots, solver='exact', a topology, or the CPU");
}

Refusal RefuseIpm(const Problem& p, const IpmOptions& options, const cuda::Device& device) {
  if (IsAnywhere(p)) return RefuseIpmAnywhere(p, options, device);
  const int64_t bytes = p.group_size > cuda::kMaxGroupSize ? 0 : cuda::IpmSharedBytes(p, options);
  if (bytes == 0) {
    return "r2o: the CUDA interior point takes groups of at most " + Number(cuda::kMaxGroupSize) +
           " ranks, and large ones with few columns only, got " + GroupsOf(p) +
           ": use smaller groups, fewer columns, or the CPU";
  }
  return NeedsMemory("r2o: in the CUDA interior point, " + GroupsOf(p), bytes, device,
                     "use smaller groups, fewer columns or experts, a larger GPU, or the CPU");
}

// Asks the device that `refuse` is about.
template <typename Refuse>
ffi::Error Check(const Refuse& refuse) {
  cuda::Device device;
  const cudaError_t error = cuda::CurrentDevice(&device);
  if (error != cudaSuccess) return FromCuda(error, "asking the GPU for its limits");
  const Refusal refusal = refuse(device);
  return refusal.empty() ? ffi::Error::Success() : Invalid(refusal);
}

Problem ProblemOf(const std::array<int32_t, 6>& sizes) {
  return Problem(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]);
}

void ThrowIf(const Refusal& refusal) {
  if (!refusal.empty()) throw nb::value_error(refusal.c_str());
}

void ThrowIf(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

cuda::Quotas QuotasOf(const std::string& name) {
  if (name == "given") return cuda::Quotas::kGiven;
  if (name == "solved") return cuda::Quotas::kSolved;
  if (name == "synced") return cuda::Quotas::kSynced;
  throw nb::value_error("quotas: expected given, solved or synced");
}

}  // namespace

ffi::Error CheckSolverFits(const Problem& problem, int64_t bytes) {
  return Check([&](const cuda::Device& device) { return RefuseSolve(problem, bytes, device); });
}

ffi::Error CheckRouteFits(const cuda::RouteArguments& arguments, cuda::Quotas quotas) {
  const int64_t words = cuda::WorkspaceWords(arguments.problem.n_logical);
  if (arguments.n_tiles < 1 || arguments.workspace_words < words) {
    return Invalid("workspace: expected [n_tiles, at least " + Number(words) + "], got [" +
                   Number(arguments.n_tiles) + ", " + Number(arguments.workspace_words) + "]");
  }
  return Check([&](const cuda::Device& device) {
    return RefuseRoute(arguments.problem, quotas, arguments.copies.fan_out > 0,
                       arguments.tokens.n_tokens, device);
  });
}

ffi::Error CheckCopiesFit(const Problem& problem) {
  return Check([&](const cuda::Device& device) { return RefuseCopies(problem, device); });
}

ffi::Error CheckIpmFits(const Problem& problem, const IpmOptions& options) {
  return Check([&](const cuda::Device& device) { return RefuseIpm(problem, options, device); });
}

void DefineLimits(nb::module_& m) {
  using Sizes = const std::array<int32_t, 6>&;
  nb::class_<cuda::Device>(m, "Device")
      .def(
          "__init__",
          [](cuda::Device* self, int32_t capability, int32_t shared_bytes, int32_t largest_cluster,
             bool dependent_launch) {
            new (self) cuda::Device{capability, shared_bytes, largest_cluster, dependent_launch};
          },
          nb::kw_only(), nb::arg("capability"), nb::arg("shared_bytes"), nb::arg("largest_cluster"),
          nb::arg("dependent_launch"))
      .def_ro("capability", &cuda::Device::capability)
      .def_ro("shared_bytes", &cuda::Device::shared_bytes)
      .def_ro("largest_cluster", &cuda::Device::largest_cluster)
      .def_ro("dependent_launch", &cuda::Device::dependent_launch);
  m.def("current_device", [] {
    cuda::Device device;
    ThrowIf(cuda::CurrentDevice(&device));
    return device;
  });
  m.def(
      "assume_device",
      [](int ordinal, const std::optional<cuda::Device>& device) {
        cuda::AssumeDevice(ordinal, device ? &*device : nullptr);
      },
      nb::arg(), nb::arg().none());
  // Returns blocks per cluster (0: tiles), threads, rounds and bytes, or raises ValueError if
  // nothing fits. `chooses`: copies for the batch are chosen first. Without a topology all ranks
  // are one node. But if there is no group either, the problem is an assign along a topology.
  m.def("route_shape", [](Sizes sizes, const std::string& quotas, bool chooses, int64_t n_tokens,
                          const cuda::Device& device) {
    Problem problem = ProblemOf(sizes);
    if (IsAnywhere(problem) && problem.group_size > 0) problem.node_size = problem.ep_size;
    ThrowIf(RefuseRoute(problem, QuotasOf(quotas), chooses, n_tokens, device));
    const auto shape = cuda::ChooseShape(problem, QuotasOf(quotas), chooses, n_tokens, device);
    return std::array<int32_t, 4>{shape.cluster, shape.threads, shape.rounds, shape.shared_bytes};
  });
  // Returns bytes, or raises in the same way.
  m.def("solve_bytes", [](Sizes sizes, const cuda::Device& device) {
    const int64_t bytes = cuda::SolveSharedBytes(ProblemOf(sizes));
    ThrowIf(RefuseSolve(ProblemOf(sizes), bytes, device));
    return bytes;
  });
  m.def("copies_bytes", [](Sizes sizes, const cuda::Device& device) {
    ThrowIf(RefuseCopies(ProblemOf(sizes), device));
    return cuda::PlaceCopiesBytes(ProblemOf(sizes));
  });
  // `options` are floats, weighted, repair, cusolverdx.
  m.def("ipm_bytes",
        [](Sizes sizes, const std::array<bool, 4>& options, const cuda::Device& device) {
          const IpmOptions o = {options[0], options[1], options[2], options[3]};
          ThrowIf(RefuseIpm(ProblemOf(sizes), o, device));
          return cuda::IpmSharedBytes(ProblemOf(sizes), o);
        });
  m.def("plan_bytes", cuda::PlanSharedBytes);
  m.def("workspace_words", cuda::WorkspaceWords);
}

}  // namespace lplb
