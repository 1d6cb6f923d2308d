// Rows of experts, and the journeys of copies, on the GPU.
#include "cuda/journeys.h"

#include "cuda/device.h"
#include "cuda/exchange.h"
#include "xla_ffi/cuda/handler.h"

namespace lplb {
namespace {

// What both calls know of experts and ranks.
struct ExpertCall {
  Size n_ranks = {"ep_size"};
  Size n_rows = {"n_rows"};
  Size n_physical = {"n_physical"};
  Size n_logical = {"n_logical"};
  int64_t batch = 0;

  cuda::ExpertSizes Finish(Frame& frame) {
    batch = frame.batch();
    if (frame.failed()) return {};
    const int64_t n_slots = n_ranks.value < 1 ? 0 : n_physical.value / n_ranks.value;
    const int64_t n_local =
        n_ranks.value < 1 ? 0 : (n_logical.value + n_ranks.value - 1) / n_ranks.value;
    if (n_slots * n_ranks.value != n_physical.value || n_slots < 1) {
      frame.Fail("phy2log: expected as many slots on each of " + std::to_string(n_ranks.value) +
                 " ranks, got " + std::to_string(n_physical.value));
    } else if (n_rows.value < n_local) {
      frame.Fail("slots: expected at least the " + std::to_string(n_local) +
                 " rows of a rank's own experts, got " + std::to_string(n_rows.value));
    }
    return {n_ranks.narrow(), static_cast<int32_t>(n_slots), n_logical.narrow(),
            static_cast<int32_t>(n_local), n_rows.narrow()};
  }
};

struct SlotsByRowCall : ExpertCall {
  Size max_replicas = {"max_replicas"};
  cuda::SlotsByRowArguments arguments = {};

  explicit SlotsByRowCall(Frame& frame) {
    n_ranks.value = frame.Attribute("ep_size", 1, Size::kMost);
    const int64_t room = frame.Attribute("room", 0, Size::kMost);
    frame.Operand("phy2log", {&n_physical}, &arguments.phy2log);
    frame.Operand("log2phy", {&n_logical, &max_replicas}, &arguments.log2phy);
    frame.Result("slots", {&n_ranks, &n_rows}, &arguments.slots);
    arguments.sizes = Finish(frame);
    arguments.max_replicas = max_replicas.narrow();
    if (frame.failed()) return;
    if (max_replicas.value < 1) frame.Fail("log2phy: expected at least one slot per expert");
    if (arguments.sizes.room() != room) frame.Fail("slots: expected rows for own experts and room");
  }
};

struct JourneysCall : ExpertCall {
  Size most = {"most"};
  Size n_sent = {"n_sent"};
  Size room = {"room"};
  Size n_lists = {"lists", cuda::kLists};
  cuda::JourneysArguments arguments = {};

  explicit JourneysCall(Frame& frame) {
    n_logical.value = frame.Attribute("n_logical", 1, cuda::kMostExperts);
    most.value = frame.Attribute("most", 1, Size::kMost);
    const int64_t n_received = frame.Attribute("n_received", 0, Size::kMost);
    frame.Operand("phy2log", {&n_physical}, &arguments.phy2log);
    frame.Operand("slots", {&n_ranks, &n_rows}, &arguments.slots);
    frame.Operand("slot_loads", {&n_physical}, &arguments.slot_loads);
    frame.Operand("me", {}, &arguments.me);
    cuda::ExpertSizes& sizes = arguments.sizes = Finish(frame);
    n_sent.value = std::min<int64_t>(sizes.n_local, n_received);
    room.value = sizes.room();
    frame.Result("rank", {&n_rows, &most}, &arguments.rank);
    frame.Result("copy", {&n_rows, &most}, &arguments.copy);
    frame.Result("order", {&n_rows, &most}, &arguments.order);
    frame.Result("sent", {&n_sent}, &arguments.sent);
    frame.Result("nth", {&n_rows}, &arguments.nth);
    frame.Result("received", {&room, &most}, &arguments.received);
    frame.Result("lists", {&n_lists, &n_ranks}, &arguments.lists);
    frame.Result("sizes", {&n_ranks}, &arguments.from);
    frame.NoBatch("phy2log");
    arguments.most = most.narrow();
    arguments.n_received = static_cast<int32_t>(n_received);
    arguments.n_sent = n_sent.narrow();
    if (frame.failed()) return;
    if (n_ranks.value * room.value > cuda::kMostCopies) {
      frame.Fail("slots: expected room for at most " + std::to_string(cuda::kMostCopies) +
                 " copies on all ranks, got " + std::to_string(n_ranks.value * room.value));
    }
    if (most.value * n_rows.value > kInt32Max) {
      frame.Fail("most: expected fewer copies per expert, got " + std::to_string(most.value));
    }
  }
};

ffi::Error RunSlotsByRow(const SlotsByRowCall& call, const OnDevice& on) {
  cuda::SlotsByRowArguments arguments = call.arguments;
  for (int64_t i = 0; i < call.batch; ++i) {
    const cudaError_t error = cuda::LaunchSlotsByRow(arguments, on.stream);
    if (error != cudaSuccess) return FromCuda(error, "slots by row");
    arguments.phy2log += call.n_physical.value;
    arguments.log2phy += call.n_logical.value * call.max_replicas.value;
    arguments.slots += call.n_ranks.value * call.n_rows.value;
  }
  return ffi::Error::Success();
}

ffi::Error RunJourneys(const JourneysCall& call, const OnDevice& on) {
  return FromCuda(cuda::LaunchJourneys(call.arguments, on.stream), "journeys");
}

const Register slots_by_row({"lplb_slots_by_row", CudaHandler<SlotsByRowCall, RunSlotsByRow>});
const Register journeys({"lplb_journeys", CudaHandler<JourneysCall, RunJourneys>});

}  // namespace
}  // namespace lplb
