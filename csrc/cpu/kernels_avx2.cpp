// The CPU kernels for one instruction set; CMakeLists.txt sets its flags for this file only.
#include "vec_avx2.h"

// The kernels use Vec, so its header comes first.
#include "confidence.h"
#include "features.h"
#include "row_loss.h"
#include "scale_rows.h"

namespace camkd::cpu {

const Kernels kernels_avx2 = {
    Vec::name, row_loss, scale_rows, confidence_forward, confidence_backward, features,
};

}  // namespace camkd::cpu
