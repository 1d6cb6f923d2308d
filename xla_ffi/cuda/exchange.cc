// Tokens to rows on all ranks and back, on the GPU.
#include "cuda/exchange.h"

#include "xla_ffi/cuda/comm.h"
#include "xla_ffi/cuda/handler.h"

namespace lplb {
namespace {

int32_t BytesOf(ffi::DataType type) {
  if (type == ffi::DataType::F64) return 8;
  return type == ffi::DataType::F32 ? 4 : 2;
}

cuda::RowType RowTypeOf(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::BF16:
      return cuda::RowType::kBFloat16;
    case ffi::DataType::F16:
      return cuda::RowType::kFloat16;
    case ffi::DataType::F64:
      return cuda::RowType::kFloat64;
    default:
      return cuda::RowType::kFloat32;
  }
}

// What both directions share.
struct ExchangeCall {
  static constexpr Frame::Types kFloats = {ffi::DataType::BF16, ffi::DataType::F16,
                                           ffi::DataType::F32, ffi::DataType::F64};

  int64_t comm;
  int64_t n_sms;  // 0 for all
  Size n_tokens = {"tokens"};
  Size hidden = {"hidden"};
  Size top_k = {"top_k"};
  Size n_ranks = {"ep_size"};
  Size n_lists = {"lists", cuda::kLists};
  Size capacity = {"capacity"};
  Size n_received = {"n_received"};
  int64_t n_sent = 0;                    // by all ranks back to this one
  Size gates_each = {"top_k or 0"};      // per token
  Size n_row_gates = {"capacity or 0"};  // 0 if tokens have no gates
  cuda::Routing routing = {};
  int32_t row_bytes = 0;

  explicit ExchangeCall(Frame& frame) {
    comm = frame.Attribute("comm", 0, kInt64Max);
    n_sms = frame.Attribute("sms", 0, Size::kMost);
    capacity.value = frame.Attribute("capacity", 1, Size::kMost);
    n_received.value = frame.Attribute("n_received", 0, Size::kMost);
    n_sent = frame.Attribute("n_sent", 0, Size::kMost);
  }
  void ReadRouting(Frame& frame) {
    frame.Operand("row", {&n_tokens, &top_k}, &routing.row);
    frame.Operand("order", {&n_tokens, &top_k}, &routing.order);
    frame.Operand("lists", {&n_lists, &n_ranks}, &routing.lists);
    frame.Operand("rank", {}, &routing.rank);
  }
  template <typename Arguments>
  void Finish(Frame& frame, ffi::DataType row_type, ffi::DataType gate_type, Arguments* arguments) {
    frame.NoBatch("tokens");
    routing.n_tokens = n_tokens.narrow();
    routing.top_k = top_k.narrow();
    routing.capacity = capacity.narrow();
    routing.n_received = n_received.narrow();
    const int64_t bytes = hidden.value * BytesOf(row_type);
    if (bytes < 1 || bytes % 16 != 0 || bytes > Size::kMost) {
      frame.Fail("hidden: expected a positive multiple of 16 bytes, got " + std::to_string(bytes));
    }
    if (top_k.value < 1) frame.Fail("top_k: expected at least 1, got none");
    row_bytes = static_cast<int32_t>(bytes);
    int32_t gate_bytes = BytesOf(gate_type);
    if (gates_each.value == 0 && n_row_gates.value == 0) {
      gate_bytes = 0;
    } else if (gates_each.value != top_k.value || n_row_gates.value != capacity.value) {
      frame.Fail("gates: expected as many as choices and rows, or none");
    }
    arguments->routing = routing;
    arguments->row_bytes = row_bytes;
    arguments->gate_bytes = gate_bytes;
  }
};

// Reads rows, see cuda::RowArrays: of tokens, [n_rows, hidden] in one array, or of experts'
// weights, [experts, rows, hidden] in several.
class RowReader {
 public:
  RowReader() { rows_[0].value = 1; }
  // For calls with weights, which have this attribute.
  explicit RowReader(Frame& frame)
      : of_weights_(true),
        n_(static_cast<int32_t>(frame.Attribute("arrays", 1, cuda::kMostArrays))) {}

  bool of_weights() const { return of_weights_; }
  // Rows of an entry in all arrays, once the operands are read.
  int64_t per_entry() const { return per_entry_; }

  // Of weights, n_rows must be known.
  ffi::DataType Operands(Frame& frame, const char* name, Size* n_rows, Size* hidden,
                         cuda::RowArrays<const char>* out) {
    if (!of_weights_) {
      const auto type = frame.Operand(name, ExchangeCall::kFloats, {n_rows, hidden}, &out->data[0]);
      SetSizes(n_rows->value, out);
      return type;
    }
    Size experts = {"experts"};
    ffi::DataType type = ffi::DataType::INVALID;
    int64_t per_entry = 0;
    for (int32_t k = 0; k < n_; ++k) {
      const Frame::Shape shape = {&experts, &rows_[k], hidden};
      type = k == 0 ? frame.Operand("weights", ExchangeCall::kFloats, shape, &out->data[k])
                    : frame.Operand("weights", {type}, shape, &out->data[k]);
      per_entry += rows_[k].value;
    }
    if (per_entry < 1 || experts.value * per_entry != n_rows->value) {
      frame.Fail("weights: expected " + std::to_string(n_rows->value) + " rows in all, got " +
                 std::to_string(experts.value) + " · " + std::to_string(per_entry));
    }
    if (frame.failed()) return ffi::DataType::INVALID;
    per_entry_ = per_entry;
    SetSizes(n_rows->value, out);
    return type;
  }
  // In as many arrays.
  void Results(Frame& frame, const char* name, ffi::DataType type, Size* n_rows, Size* hidden,
               cuda::RowArrays<char>* out) {
    if (!of_weights_) {
      frame.Result(name, {type}, {n_rows, hidden}, &out->data[0]);
    } else if (n_rows->value % per_entry_ != 0) {
      frame.Fail("row: expected " + std::to_string(per_entry_) + " rows per expert, got " +
                 std::to_string(n_rows->value) + " in all");
    } else {
      Size experts = {"experts", n_rows->value / per_entry_};
      for (int32_t k = 0; k < n_; ++k) {
        frame.Result("weights", {type}, {&experts, &rows_[k], hidden}, &out->data[k]);
      }
    }
    SetSizes(n_rows->value, out);
  }

 private:
  template <typename Byte>
  void SetSizes(int64_t n_rows, cuda::RowArrays<Byte>* out) const {
    for (int32_t k = 0; k < n_; ++k) out->rows[k] = rows_[k].narrow();
    out->n_arrays = n_;
    out->per_entry = static_cast<int32_t>(per_entry_);
    out->n_entries = static_cast<int32_t>(n_rows / per_entry_);
  }

  bool of_weights_ = false;
  int32_t n_ = 1;
  int64_t per_entry_ = 1;
  Size rows_[cuda::kMostArrays] = {{"rows"}, {"rows"}, {"rows"}, {"rows"}};
};

// Tokens to rows; or the weights of listed experts to where copies are, among all weights.
struct ThereCall : ExchangeCall {
  cuda::ThereArguments arguments = {};

  explicit ThereCall(Frame& frame, RowReader reader = {}) : ExchangeCall(frame) {
    Size* const n_operand = reader.of_weights() ? &capacity : &n_tokens;
    const auto rows = reader.Operands(frame, "tokens", n_operand, &hidden, &arguments.tokens);
    if (reader.of_weights()) {
      arguments.first_row = static_cast<int32_t>(frame.Attribute("first_row", 0, capacity.value));
      Size n_listed = {"sent"};
      frame.Operand("sent", {&n_listed}, &arguments.tokens.listed);
      n_tokens.value = n_listed.value * reader.per_entry();
    }
    const auto gates = frame.Operand("gates", kFloats, {&n_tokens, &gates_each}, &arguments.gates);
    ReadRouting(frame);
    reader.Results(frame, "rows", rows, &capacity, &hidden, &arguments.rows);
    frame.Result("row_gates", {gates}, {&n_row_gates}, &arguments.row_gates);
    frame.Result("numbers", {&n_received, &top_k}, &arguments.numbers);
    frame.Result("sizes", {&n_ranks}, &arguments.sizes);
    Finish(frame, rows, gates, &arguments);
  }
};

// Rows to tokens; or gradients of weights to their homes.
struct BackCall : ExchangeCall {
  cuda::BackArguments arguments = {};

  explicit BackCall(Frame& frame, RowReader reader = {}) : ExchangeCall(frame) {
    const auto rows = reader.Operands(frame, "rows", &capacity, &hidden, &arguments.rows);
    const auto gates = frame.Operand("row_gates", kFloats, {&n_row_gates}, &arguments.row_gates);
    ReadRouting(frame);
    frame.Operand("numbers", {&n_received, &top_k}, &arguments.numbers);
    frame.Operand("sizes", {&n_ranks}, &arguments.sizes);
    reader.Results(frame, "tokens", rows, &n_tokens, &hidden, &arguments.tokens);
    frame.Result("gates", {gates}, {&n_tokens, &gates_each}, &arguments.gates);
    Finish(frame, rows, gates, &arguments);
    arguments.type = RowTypeOf(rows);
    arguments.spares_empty = reader.of_weights();
  }
};

struct WeightsThereCall : ThereCall {
  explicit WeightsThereCall(Frame& frame) : ThereCall(frame, RowReader(frame)) {
    for (int32_t k = 0; k < arguments.rows.n_arrays; ++k) {
      if (!frame.failed() && arguments.rows.data[k] != arguments.tokens.data[k]) {
        frame.Fail("weights: expected the results in the place of the operands");
      }
    }
  }
};

struct WeightsBackCall : BackCall {
  explicit WeightsBackCall(Frame& frame) : BackCall(frame, RowReader(frame)) {}
};

// The window must have room for everything the routing can ask for: nothing checks it later.
ffi::Error CheckWindow(const ExchangeCall& call, const cuda::WindowSizes& window) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  const int64_t needed = std::max(call.n_sent, call.n_received.value);
  if (call.n_ranks.value == window.n_ranks && call.top_k.value <= window.top_k &&
      needed <= window.n_tokens && call.row_bytes <= window.row_bytes) {
    return ffi::Error::Success();
  }
  return Invalid("comm: its windows are of " + number(window.n_ranks) + " ranks, " +
                 number(window.n_tokens) + " tokens of " + number(window.row_bytes) +
                 " bytes and top_k " + number(window.top_k) + ", and this call needs " +
                 number(call.n_ranks.value) + ", " + number(needed) + " of " +
                 number(call.row_bytes) + " and " + number(call.top_k.value));
}

template <typename Call, typename Launch>
ffi::Error RunExchange(const Call& call, const OnDevice& on, const Launch& launch,
                       const char* name) {
  const auto found = FindRank(call.comm, on.ordinal);
  if (found.has_error()) return found.error();
  LPLB_RETURN_IF_ERROR(CheckWindow(call, found->window()));
  int n_sms = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, on.ordinal);
  if (error != cudaSuccess) return FromCuda(error, name);
  if (call.n_sms > 0) n_sms = static_cast<int>(std::min<int64_t>(n_sms, call.n_sms));
  const cuda::ExchangeOptions options =
      cuda::ChooseOptions(call.arguments.routing, found->window().n_ranks, call.row_bytes, n_sms);
  return FromCuda(launch(*found, call.arguments, options, on.stream), name);
}

template <typename Call>
ffi::Error RunThere(const Call& call, const OnDevice& on) {
  return RunExchange(call, on, LaunchThere, "there");
}

template <typename Call>
ffi::Error RunBack(const Call& call, const OnDevice& on) {
  return RunExchange(call, on, LaunchBack, "back");
}

const Register there({"lplb_there", CudaHandler<ThereCall, RunThere<ThereCall>>, InitializeComm});
const Register back({"lplb_back", CudaHandler<BackCall, RunBack<BackCall>>, InitializeComm});
const Register weights_there({"lplb_weights_there",
                              CudaHandler<WeightsThereCall, RunThere<WeightsThereCall>>,
                              InitializeComm});
const Register weights_back({"lplb_weights_back",
                             CudaHandler<WeightsBackCall, RunBack<WeightsBackCall>>,
                             InitializeComm});

}  // namespace
}  // namespace lplb
