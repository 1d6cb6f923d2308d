// The plan of an exchange on the GPU, from counts that are known or still to be exchanged.
#include "cuda/exchange_plan.h"

#include "cuda/device.h"
#include "xla_ffi/cuda/comm.h"
#include "xla_ffi/cuda/handler.h"

namespace lplb {
namespace {

struct PlanCall {
  Size n_tokens = {"tokens"};
  Size top_k = {"top_k"};
  Size n_ranks = {"ep_size"};
  Size n_slots = {"slots"};
  Size n_groups = {"groups"};
  Size n_lists = {"lists", cuda::kLists};
  Size n_physical = {"n_physical"};
  Size n_tiles = {"n_tiles"};
  int64_t batch = 0;
  cuda::PlanArguments arguments = {};

  explicit PlanCall(Frame& frame, bool synced = false) {
    arguments.capacity = static_cast<int32_t>(frame.Attribute("capacity", 1, Size::kMost));
    frame.Operand("slot", {&n_tokens, &top_k}, &arguments.slot);
    frame.Operand("position", {&n_tokens, &top_k}, &arguments.position);
    if (synced) {
      frame.Operand("counts", {&n_physical}, &arguments.counts);
    } else {
      frame.Operand("counts", {&n_ranks, &n_ranks, &n_slots}, &arguments.counts);
    }
    frame.Operand("groups", {&n_ranks, &n_groups}, &arguments.groups);
    SetPhysical(frame);
    frame.Operand("rank", {}, &arguments.rank);
    frame.Result("row", {&n_tokens, &top_k}, &arguments.row);
    frame.Result("order", {&n_tokens, &top_k}, &arguments.order);
    frame.Result("lists", {&n_lists, &n_ranks}, &arguments.lists);
    frame.Result("group_sizes", {&n_groups}, &arguments.group_sizes);
    frame.Result("slot_loads", {&n_physical}, &arguments.slot_loads);
    frame.Result("overflow", {}, &arguments.overflow);
    frame.Result("workspace", {&n_tiles, &n_ranks}, &arguments.workspace);
    if (synced) frame.NoBatch("slot");
    batch = frame.batch();
    arguments.n_tiles = n_tiles.narrow();
    arguments.n_ranks = n_ranks.narrow();
    arguments.n_slots = n_slots.narrow();
    arguments.n_groups = n_groups.narrow();
    arguments.n_tokens = n_tokens.narrow();
    arguments.top_k = top_k.narrow();
  }

 private:
  void SetPhysical(Frame& frame) {
    if (frame.failed()) return;
    if (n_ranks.value < 1) return frame.Fail("groups: expected those of at least one rank");
    if (n_physical.value == Size::kUnknown) n_physical.value = n_ranks.value * n_slots.value;
    n_slots.value = n_physical.value / n_ranks.value;
    if (n_slots.value * n_ranks.value != n_physical.value) {
      frame.Fail("counts: expected those of as many slots on each of " +
                 std::to_string(n_ranks.value) + " ranks, got " + std::to_string(n_physical.value));
    }
  }
};

struct SyncedPlanCall : PlanCall {
  int64_t comm;

  explicit SyncedPlanCall(Frame& frame) : PlanCall(frame, true) {
    comm = frame.Attribute("comm", 0, kInt64Max);
  }
};

ffi::Error CheckPlanFits(const PlanCall& call) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  if (call.top_k.value < 1 || call.top_k.value > cuda::kMostChoices) {
    return Invalid("top_k: expected 1 to " + number(cuda::kMostChoices) + ", got " +
                   number(call.top_k.value));
  }
  if (call.n_tiles.value < 1) return Invalid("workspace: expected at least one tile, got none");
  cuda::Device device;
  const cudaError_t error = cuda::CurrentDevice(&device);
  if (error != cudaSuccess) return FromCuda(error, "asking the GPU for its limits");
  const int64_t bytes = cuda::PlanSharedBytes(call.n_ranks.value, call.n_slots.value);
  if (bytes <= device.shared_bytes) return ffi::Error::Success();
  return Invalid("assignment: to plan rows, " + number(call.n_slots.value) + " slots on each of " +
                 number(call.n_ranks.value) + " ranks need " + number(bytes) +
                 " bytes of a block's shared memory, and this GPU has " +
                 number(device.shared_bytes) + ": use fewer slots per rank");
}

// Moves to the next batch element.
void Advance(const PlanCall& call, cuda::PlanArguments* arguments) {
  const int64_t choices = call.n_tokens.value * call.top_k.value;
  arguments->slot += choices;
  arguments->position += choices;
  arguments->counts += call.n_ranks.value * call.n_physical.value;
  arguments->groups += call.n_ranks.value * call.n_groups.value;
  arguments->rank += 1;
  arguments->row += choices;
  arguments->order += choices;
  arguments->lists += cuda::kLists * call.n_ranks.value;
  arguments->group_sizes += call.n_groups.value;
  arguments->slot_loads += call.n_physical.value;
  arguments->overflow += 1;
  arguments->workspace += call.n_tiles.value * call.n_ranks.value;
}

ffi::Error RunPlan(const PlanCall& call, const OnDevice& on) {
  LPLB_RETURN_IF_ERROR(CheckPlanFits(call));
  cuda::PlanArguments arguments = call.arguments;
  for (int64_t i = 0; i < call.batch; ++i, Advance(call, &arguments)) {
    const cudaError_t error = cuda::LaunchPlan(arguments, on.stream);
    if (error != cudaSuccess) return FromCuda(error, "plan");
  }
  return ffi::Error::Success();
}

ffi::Error RunSyncedPlan(const SyncedPlanCall& call, const OnDevice& on) {
  LPLB_RETURN_IF_ERROR(CheckPlanFits(call));
  const auto found = FindRank(call.comm, on.ordinal);
  if (found.has_error()) return found.error();
  const cuda::Peers& peers = found->peers;
  if (peers.size != call.n_ranks.value || call.n_physical.value > peers.stride ||
      found->put_kernel != nullptr) {
    return Invalid("comm: it is of " + std::to_string(peers.size) + " ranks and " +
                   std::to_string(peers.stride) + " slots, got " +
                   std::to_string(call.n_ranks.value) + " and " +
                   std::to_string(call.n_physical.value));
  }
  return FromCuda(cuda::LaunchSyncedPlan(peers, call.arguments, on.stream), "plan");
}

const Register plan({"lplb_plan", CudaHandler<PlanCall, RunPlan>});
const Register synced_plan({"lplb_synced_plan", CudaHandler<SyncedPlanCall, RunSyncedPlan>,
                            InitializeComm});

}  // namespace
}  // namespace lplb
