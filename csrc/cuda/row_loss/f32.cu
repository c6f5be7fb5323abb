#include "launch.cuh"

namespace camkd::cuda {

template void launch_row_loss<float>(RowLaunch&, const LaunchOptions&, const RowTrial&);

}  // namespace camkd::cuda
