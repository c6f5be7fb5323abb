#include "launch.cuh"

namespace camkd::cuda {

template void launch_row_loss<f16>(RowLaunch&, const LaunchOptions&, const RowTrial&);

}  // namespace camkd::cuda
