// Calls the launchers on raw device pointers and a raw stream, for benchmarks and tests that time
// or order kernels without XLA around them. The kernels are those of _cuda, which lends its
// launchers.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <stdexcept>

#include "xla_ffi/cuda/launchers.h"

namespace lplb {
namespace {

using Pointer = uintptr_t;

template <typename T = int32_t>
T* As(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);
}

const Launchers& Lent() {
  static const auto* launchers =
      static_cast<const Launchers*>(PyCapsule_Import(Launchers::kCapsule, 0));
  if (launchers == nullptr) throw nanobind::python_error();
  return *launchers;
}

void ThrowIf(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(Lent().error_string(error));
}

Problem ProblemOf(const std::array<int32_t, 6>& sizes) {
  Problem problem(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]);
  if (problem.n_columns == 0) problem.node_size = problem.ep_size;
  return problem;
}

void LaunchSolve(std::array<int32_t, 6> problem, std::array<int32_t, 2> sources, int64_t batch,
                 std::array<Pointer, 4> in, std::array<Pointer, 4> out, Pointer stream) {
  ThrowIf(Lent().solve(ProblemOf(problem), {sources[0], sources[1]}, batch,
                       {As(in[0]), As(in[1]), As(in[2]), As(in[3])},
                       {As(out[0]), As(out[1]), As(out[2]), As(out[3])}, As<CUstream_st>(stream)));
}

// in: loads, phy2log, log2phy; out: phy2log, log2phy [n_logical, width], logcnt.
void LaunchPlaceCopies(std::array<int32_t, 6> problem, std::array<int32_t, 2> sources,
                       int64_t batch, std::array<Pointer, 3> in, int32_t fan_out, int32_t width,
                       std::array<Pointer, 3> out, Pointer stream) {
  ThrowIf(Lent().place_copies(ProblemOf(problem), {sources[0], sources[1]}, batch,
                              {As(in[0]), As(in[1]), As(in[2]), nullptr}, fan_out, width,
                              {As(out[0]), As(out[1]), As(out[2])}, As<CUstream_st>(stream)));
}

// in: indices (int32), phy2log, log2phy, r2o; out: physical, position, slot counts, quota,
// max_load, lower_bound, status, workspace [n_tiles, words]; copies: phy2log, log2phy [n_logical,
// width] and logcnt of the chosen copies, none if fan_out is 0; costs: base_load and max_tokens,
// null where tokens are balanced.
cuda::RouteArguments ArgumentsOf(std::array<int32_t, 6> problem, int64_t batch, int64_t n_tokens,
                                 std::array<int64_t, 2> tiles, std::array<Pointer, 4> in,
                                 std::array<Pointer, 8> out, int32_t fan_out, int32_t width,
                                 std::array<Pointer, 3> copies, int32_t tile,
                                 std::array<Pointer, 2> costs) {
  cuda::RouteArguments arguments = {};
  arguments.problem = ProblemOf(problem);
  arguments.sources = {1, arguments.problem.n_logical + 1};
  arguments.tokens = {
      As<const void>(in[0]), n_tokens, cuda::IndexType::kInt32, As(out[0]), As(out[1]), As(out[2])};
  arguments.solve_in = {nullptr, As(in[1]), As(in[2]), As(in[3])};
  arguments.solve_out = {As(out[3]), As(out[4]), As(out[5]), As(out[6])};
  arguments.copies = {fan_out, width, {As(copies[0]), As(copies[1]), As(copies[2])}};
  arguments.costs = {TokenDivisor(tile), As<const int32_t>(costs[0]), As(costs[1])};
  arguments.workspace = As(out[7]);
  arguments.batch = batch;
  arguments.n_tiles = static_cast<int32_t>(tiles[0]);
  arguments.workspace_words = tiles[1];
  return arguments;
}

void LaunchRebalance(std::array<int32_t, 6> problem, int64_t batch, int64_t n_tokens,
                     std::array<int64_t, 2> tiles, std::array<Pointer, 4> in,
                     std::array<Pointer, 8> out, int32_t fan_out, int32_t width,
                     std::array<Pointer, 3> copies, int32_t tile, std::array<Pointer, 2> costs,
                     Pointer stream) {
  const auto arguments =
      ArgumentsOf(problem, batch, n_tokens, tiles, in, out, fan_out, width, copies, tile, costs);
  ThrowIf(Lent().rebalance(arguments, As<CUstream_st>(stream)));
}

CommRank RankOf(int64_t comm, int32_t device) {
  const auto found = Lent().find_rank(comm, device);
  if (found.has_error()) throw std::runtime_error(found.error().message());
  return *found;
}

// Runs as the rank of `device` in communicator `comm`.
void LaunchSyncedRebalance(int64_t comm, int32_t device, Pointer rank,
                           std::array<int32_t, 6> problem, int64_t n_tokens,
                           std::array<int64_t, 2> tiles, std::array<Pointer, 4> in,
                           std::array<Pointer, 8> out, int32_t fan_out, int32_t width,
                           std::array<Pointer, 3> copies, int32_t tile,
                           std::array<Pointer, 2> costs, Pointer stream) {
  cuda::RouteArguments arguments =
      ArgumentsOf(problem, 1, n_tokens, tiles, in, out, fan_out, width, copies, tile, costs);
  arguments.given.rank = As(rank);
  arguments.peers = RankOf(comm, device).peers;
  ThrowIf(Lent().synced_rebalance(arguments, As<CUstream_st>(stream)));
}

// Launches the interior point. `in` has the weights last. `options` are floats, weighted, repair,
// cusolverdx.
void LaunchIpm(std::array<int32_t, 6> problem, std::array<int32_t, 2> sources,
               std::array<bool, 4> options, int64_t batch, std::array<Pointer, 5> in,
               std::array<Pointer, 4> out, Pointer stream) {
  ThrowIf(Lent().ipm(ProblemOf(problem), {sources[0], sources[1]},
                     {options[0], options[1], options[2], options[3]}, batch,
                     {{As(in[0]), As(in[1]), As(in[2]), As(in[3])}, As<const float>(in[4])},
                     {As(out[0]), As(out[1]), As(out[2]), As(out[3])}, As<CUstream_st>(stream)));
}

// sync_loads as the rank of `device` in communicator `comm`.
void LaunchSyncOf(int64_t comm, int32_t device, Pointer rank, Pointer counts, int32_t n,
                  Pointer matrix, Pointer stream) {
  ThrowIf(Lent().sync(RankOf(comm, device), As(rank), As(counts), n, As(matrix),
                      As<CUstream_st>(stream)));
}

// sizes: tokens, top_k, capacity, n_received; of: rank, row, order, lists.
cuda::Routing RoutingOf(const std::array<int32_t, 4>& sizes, const std::array<Pointer, 4>& of) {
  return {As(of[0]), As(of[1]), As(of[2]), As(of[3]), sizes[0], sizes[1], sizes[2], sizes[3]};
}

// n_rows in `per_entry.size()` arrays, the first of `of`, see cuda::RowArrays.
template <typename Byte>
cuda::RowArrays<Byte> RowsOf(int32_t n_rows, const std::vector<int32_t>& per_entry,
                             const std::vector<Pointer>& of) {
  cuda::RowArrays<Byte> rows = {};
  rows.n_arrays = static_cast<int32_t>(per_entry.size());
  for (size_t k = 0; k < per_entry.size(); ++k) {
    rows.data[k] = As<Byte>(of.at(k));
    rows.rows[k] = per_entry[k];
    rows.per_entry += per_entry[k];
  }
  rows.n_entries = n_rows / rows.per_entry;
  return rows;
}

// Exchanges as the rank of `device` in communicator `comm`, of at most kMostArrays arrays.
// bytes: per row and per gate; blocks: all, and those that send. in: arrays of tokens, gates, the
// list of entries or 0; out: arrays of rows, row_gates, numbers, sizes. A failure spares rows
// before first_row.
void LaunchThereOf(int64_t comm, int32_t device, std::array<int32_t, 4> sizes, int32_t first_row,
                   const std::vector<int32_t>& per_entry, std::array<int32_t, 2> bytes,
                   std::array<int32_t, 2> blocks, std::array<Pointer, 4> routing,
                   const std::vector<Pointer>& in, const std::vector<Pointer>& out,
                   Pointer stream) {
  const cuda::Routing where = RoutingOf(sizes, routing);
  const size_t n = per_entry.size();
  auto tokens = RowsOf<const char>(where.n_tokens, per_entry, in);
  tokens.listed = As(in.at(n + 1));
  const auto rows = RowsOf<char>(where.capacity, per_entry, out);
  ThrowIf(Lent().there(RankOf(comm, device),
                       {where, tokens, As<void>(in.at(n)), rows, As<void>(out.at(n)),
                        As(out.at(n + 1)), As(out.at(n + 2)), bytes[0], bytes[1], first_row},
                       {blocks[0], blocks[1]}, As<CUstream_st>(stream)));
}

// type: a RowType. in: arrays of rows, row_gates, numbers, sizes; out: arrays of tokens, gates.
void LaunchBackOf(int64_t comm, int32_t device, std::array<int32_t, 4> sizes,
                  const std::vector<int32_t>& per_entry, std::array<int32_t, 2> bytes, int32_t type,
                  std::array<int32_t, 2> blocks, std::array<Pointer, 4> routing,
                  const std::vector<Pointer>& in, const std::vector<Pointer>& out, Pointer stream) {
  const cuda::Routing where = RoutingOf(sizes, routing);
  const size_t n = per_entry.size();
  const auto rows = RowsOf<const char>(where.capacity, per_entry, in);
  const auto tokens = RowsOf<char>(where.n_tokens, per_entry, out);
  ThrowIf(Lent().back(
      RankOf(comm, device),
      {where, rows, As<void>(in.at(n)), As(in.at(n + 1)), As(in.at(n + 2)), tokens,
       As<void>(out.at(n)), bytes[0], bytes[1], static_cast<cuda::RowType>(type), false},
      {blocks[0], blocks[1]}, As<CUstream_st>(stream)));
}

// The cost of a launch by itself.
void LaunchEmpty(Pointer stream) { ThrowIf(Lent().empty(As<CUstream_st>(stream))); }

}  // namespace
}  // namespace lplb

NB_MODULE(_bench, m) {
  m.def("launch_solve", lplb::LaunchSolve);
  m.def("launch_place_copies", lplb::LaunchPlaceCopies);
  m.def("launch_ipm", lplb::LaunchIpm);
  m.def("launch_sync", lplb::LaunchSyncOf);
  m.def("launch_there", lplb::LaunchThereOf);
  m.def("launch_back", lplb::LaunchBackOf);
  m.def("launch_empty", lplb::LaunchEmpty);
  m.def("launch_rebalance", lplb::LaunchRebalance);
  m.def("launch_synced_rebalance", lplb::LaunchSyncedRebalance);
}
