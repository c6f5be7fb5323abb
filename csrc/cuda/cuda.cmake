# The CUDA kernels of _C, controlled by the environment variables CAMKD_FAST_CUDA=auto|0|1 and CAMKD_FAST_CUDA_ARCHS. The
# module keeps the outcome. setup.py sets CAMKD_CUDA_FAILED to the error message if compiling the kernels has failed.
set(mode "$ENV{CAMKD_FAST_CUDA}")
if(mode STREQUAL "")
  set(mode auto)
elseif(NOT mode MATCHES "^(auto|0|1)$")
  message(FATAL_ERROR "CAMKD_FAST_CUDA must be auto, 0 or 1, got ${mode}")
endif()

# A file instead of definitions, because a compiler's message could break a command line.
function(write_cuda_build built text)
  file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/cuda_build.h CONTENT
       "#define CAMKD_CUDA ${built}\n#define CAMKD_CUDA_BUILD R\"words(${text})words\"\n")
  target_include_directories(_C PRIVATE ${CMAKE_CURRENT_BINARY_DIR})
endfunction()

set(missing "")
if(mode STREQUAL "0")
  set(missing "CAMKD_FAST_CUDA=0 at build time")
elseif(NOT "${CAMKD_CUDA_FAILED}" STREQUAL "")
  set(missing "the CUDA kernels did not compile: ${CAMKD_CUDA_FAILED}")
else()
  include(CheckLanguage)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # set below
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(missing "no working nvcc at build time (looked in PATH and CUDACXX)")
  else()
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
      set(missing "nvcc ${CMAKE_CUDA_COMPILER_VERSION} at build time, but 12.8 is needed")
    endif()
  endif()
endif()

if(NOT missing STREQUAL "")
  if(mode STREQUAL "1")
    message(FATAL_ERROR "CAMKD_FAST_CUDA=1, but ${missing}")
  endif()
  message(STATUS "No CUDA kernels: ${missing}")
  write_cuda_build(0 "${missing}")
  return()
endif()

# Machine code only for the GPUs of this machine, which takes a fraction of the time. Without a GPU, or with one that this
# nvcc does not support: machine code for Hopper, where backend="auto" uses these kernels, and PTX, which the driver of a
# later GPU translates when a kernel is first used.
set(archs "$ENV{CAMKD_FAST_CUDA_ARCHS}")
if(archs STREQUAL "")
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader OUTPUT_VARIABLE found
                  RESULT_VARIABLE status TIMEOUT 10 ERROR_QUIET)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE supported)
  if(status EQUAL 0)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" found "${found}")
    list(REMOVE_DUPLICATES found)
    foreach(capability IN LISTS found)
      string(REPLACE "." "" arch "${capability}")
      if(arch GREATER_EQUAL 80 AND supported MATCHES "sm_${arch}\n")
        list(APPEND archs "${arch}-real")
      endif()
    endforeach()
  endif()
  if(archs STREQUAL "")
    set(archs "90")
  endif()
elseif(NOT archs MATCHES "^([0-9]+[af]?(-real|-virtual)?;?)+$")
  message(FATAL_ERROR "CAMKD_FAST_CUDA_ARCHS must be like 80-real;90, got ${archs}")
endif()
target_sources(_C PRIVATE cuda/bindings.cpp cuda/batch_mean.cu cuda/confidence.cu cuda/elementwise.cu
                          cuda/row_loss/row_loss.cu cuda/row_loss/f32.cu cuda/row_loss/bf16.cu cuda/row_loss/f16.cu)
string(REPLACE ";" " " listed "${archs}")
write_cuda_build(1 "${listed}")
# The runtime is linked statically, so that importing the module needs neither a driver nor a toolkit.
set_target_properties(_C PROPERTIES CUDA_ARCHITECTURES "${archs}" CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
                                    CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
