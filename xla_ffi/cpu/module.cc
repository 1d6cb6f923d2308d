#include "xla_ffi/module.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "xla_ffi/cpu/amending.h"
#include "xla_ffi/cpu/graph_waves.h"
#include "xla_ffi/cpu/placing.h"

namespace lplb {
namespace {

template <typename T>
using Array = nanobind::ndarray<T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

[[noreturn]] void Refuse(const std::string& message) {
  throw nanobind::value_error(message.c_str());
}

// The waves would never end on negative loads, nor on sums that overflow.
void CheckBatches(const Array<const int64_t>& batches, size_t n_batches, size_t n_logical) {
  if (batches.size() != n_batches * n_logical) {
    Refuse("batches: expected " + std::to_string(n_batches) + " · " + std::to_string(n_logical) +
           " loads, got " + std::to_string(batches.size()));
  }
  for (size_t b = 0; b < n_batches; ++b) {
    int64_t left = std::numeric_limits<int64_t>::max();
    for (size_t e = 0; e < n_logical; ++e) {
      const int64_t load = batches.data()[b * n_logical + e];
      if (load < 0 || load > left) {
        Refuse("batches: expected loads of at least 0 with sums below 2⁶³, got " +
               std::to_string(load) + " for expert " + std::to_string(e) + " of batch " +
               std::to_string(b));
      }
      left -= load;
    }
  }
}

// Fills `homes` [n_logical] from the table phy2log [n_physical].
void Homes(Array<const int32_t> phy2log, int32_t ep_size, Array<int32_t> homes) {
  const ReplicaGraph graph(ep_size, static_cast<int32_t>(homes.size()),
                           static_cast<int32_t>(phy2log.size()) / ep_size, phy2log.data());
  FindHomes(graph, homes.data());
}

// Fills `phy2log` [n_physical] and `homes` [n_logical] with one placement for `loads` [n_logical].
// Experts get copies until no share exceeds `theta`. The remaining slots hold second copies, made
// before packing (`all`), or links between ranks, made afterwards. If given, `home_ranks`
// [n_logical] fixes the homes.
void Place(Array<const double> loads, std::optional<Array<const int32_t>> home_ranks,
           int32_t ep_size, int32_t n_nodes, bool stay, double theta, bool all, double meet,
           Array<int32_t> phy2log, Array<int32_t> homes) {
  for (size_t e = 0; e < loads.size(); ++e) {
    if (!(loads.data()[e] >= 0) || std::isinf(loads.data()[e])) {
      Refuse("loads: expected finite loads of at least 0, got " + std::to_string(loads.data()[e]) +
             " for expert " + std::to_string(e));
    }
  }
  const PlaceSizes sizes = {ep_size, static_cast<int32_t>(loads.size()),
                            static_cast<int32_t>(phy2log.size()) / ep_size, ep_size / n_nodes};
  Placing placing(sizes, loads.data(), home_ranks ? home_ranks->data() : nullptr, stay);
  placing.Pack(placing.Counts(theta, all), meet);
  placing.Link();
  placing.Write(phy2log.data(), homes.data());
}

// Fills `most` [n_batches] with the largest rank load of each of `batches` [n_batches · n_logical],
// balanced exactly.
void BestLoads(Array<const int32_t> phy2log, int32_t ep_size, Array<const int64_t> batches,
               Array<int64_t> most) {
  if (most.size() == 0) return;
  const int32_t n_logical = static_cast<int32_t>(batches.size() / most.size());
  CheckBatches(batches, most.size(), n_logical);
  const ReplicaGraph graph(ep_size, n_logical, static_cast<int32_t>(phy2log.size()) / ep_size,
                           phy2log.data());
  GraphWaves waves(graph);
  for (size_t b = 0; b < most.size(); ++b) {
    most.data()[b] = waves.Run(batches.data() + b * n_logical);
  }
}

// Changes `phy2log` and `homes` until each of `batches` [n_batches · n_logical] has at most the
// ratio of largest to mean rank load in `goals` [n_batches]. Returns the sum of the remaining
// excesses.
double Amend(Array<int32_t> phy2log, Array<int32_t> homes, int32_t ep_size, int32_t n_nodes,
             bool swaps_only, Array<const int64_t> batches, Array<const double> goals,
             int64_t most_solves) {
  CheckBatches(batches, goals.size(), homes.size());
  const AmendSizes sizes = {ep_size, static_cast<int32_t>(homes.size()),
                            static_cast<int32_t>(phy2log.size()) / ep_size, ep_size / n_nodes,
                            swaps_only};
  const Goals all = {batches.data(), goals.data(), static_cast<int32_t>(goals.size())};
  return Amending(sizes, all, phy2log.data(), homes.data()).Run(most_solves);
}

}  // namespace
}  // namespace lplb

NB_MODULE(_cpu, m) {
  lplb::DefineModule(m);
  m.def("homes", lplb::Homes);
  m.def("place", lplb::Place);
  m.def("best_loads", lplb::BestLoads);
  m.def("amend", lplb::Amend);
}
