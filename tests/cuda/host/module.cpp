// The CUDA functions of the Python module, compiled for the host, and access to the launch table.
#include "../../../csrc/python/module.h"
#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/row_loss/pipeline.cuh"
#include "../../../csrc/python/tensors.h"

void camkd::cuda::return_to_device(int) noexcept {}

int camkd::cuda::exchange_device(int) {
    return 0;
}

PYBIND11_MODULE(emulated_cuda, m) {
    camkd::cuda::add_bindings(m);
    camkd::cuda::host::expected_copies = 0x3f;
    m.def("connect_tensors", &camkd::tensors::connect);
    // Whether the blocks of a grid run at once; whether launches of their own add up a minibatch.
    m.def("set_grid", [](bool together, bool separate) {
        camkd::cuda::host::together = together;
        camkd::cuda::host::separate = separate;
    });
    m.def("set_limits", [](int multiprocessors, int shared, int of_all_blocks, int l2, int cluster, int threads,
                           int least_cooperative, int pipeline_warps) {
        camkd::cuda::host::limits = {multiprocessors, shared,  of_all_blocks,     l2,
                                     cluster,         threads, least_cooperative, pipeline_warps};
    });
    // The geometry of the last row_loss: (warp per row, chunks, blocks per group, cooperative, pipelined).
    m.def("last_rows", [] {
        const auto& g = camkd::cuda::host::last_rows;
        return pybind11::make_tuple(g.warp_per_row, g.chunks, g.blocks_per_group, g.cooperative, g.pipelined);
    });
    // A block that runs much slower than the others; -1 for none.
    m.def("set_lagging", [](int64_t block) { camkd::cuda::host::lagging = block; });
    // The counters of a minibatch (batch_mean.cuh): labels and blocks, and blocks that have ended.
    m.def("counters", [] {
        const auto* const counters = camkd::cuda::counters_for({});
        return pybind11::make_tuple(counters->counted, counters->finished);
    });
    // The geometry that row_loss would use.
    m.def("row_geometry", [](int64_t N, int C, int K, int vector) {
        // Dense rows whose width is no multiple of a vector do not all begin at a vector boundary
        const int vectors = (C + (C % vector ? 2 * vector - 2 : 0)) / vector;
        camkd::cuda::RowProblem p{};
        p.N = N, p.C = C, p.K = K, p.vectors = vectors, p.vector = vector;
        p.fixed_k = K <= camkd::cuda::kMaxFixedK ? K : 0;
        p.needs_mean = true;
        camkd::cuda::RowShared::measure(p, false);
        const auto g = camkd::cuda::row_geometry(p, camkd::cuda::device_limits());
        return pybind11::make_tuple(g.warp_per_row, g.rows, g.slots, g.chunks, g.blocks_per_group, g.threads, g.blocks,
                                    g.shared, g.cooperative, g.pipelined);
    });
}
