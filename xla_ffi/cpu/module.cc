#include "xla_ffi/module.h"

#include <nanobind/ndarray.h>

#include "xla_ffi/cpu/graph_waves.h"

namespace lplb {
namespace {

template <typename T>
using Array = nanobind::ndarray<T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

// Fills `homes` [n_logical] for the table phy2log [n_physical].
void Homes(Array<const int32_t> phy2log, int32_t ep_size, Array<int32_t> homes) {
  const ReplicaGraph graph(ep_size, static_cast<int32_t>(homes.size()),
                           static_cast<int32_t>(phy2log.size()) / ep_size, phy2log.data());
  FindHomes(graph, homes.data());
}

}  // namespace
}  // namespace lplb

NB_MODULE(_cpu, m) {
  lplb::DefineModule(m);
  m.def("homes", lplb::Homes);
}
