// The CUDA functions of the Python module, compiled for the host.
#include "../../csrc/cuda/bindings.h"
#include "../../csrc/cuda/launch.h"

PYBIND11_MODULE(cuda_host, m) {
    camkd::cuda::add_bindings(m);
    m.def("set_limits", [](int multiprocessors, int shared, int l2, int cluster, int threads) {
        camkd::cuda::host::limits = {multiprocessors, shared, 3 * (shared + 1024), l2, cluster, threads};
    });
    // How row_loss would run: (warp teams, rows together, slots, batches, cluster).
    m.def("row_geometry", [](int64_t N, int C, int K, int vector) {
        camkd::cuda::RowProblem p{N, C, K, vector, 1212, 40 * (K + 1), 40 * (K + 1), true};
        const auto g = camkd::cuda::row_geometry(p, camkd::cuda::device_limits());
        return pybind11::make_tuple(g.warp_teams, g.rows, g.slots, g.batches, g.cluster, g.threads, g.blocks, g.shared);
    });
}
