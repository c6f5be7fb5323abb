# The CUDA kernels of _C, controlled by the environment variables CAMKD_FAST_CUDA=auto|0|1 and CAMKD_FAST_CUDA_ARCHS. The
# module keeps the outcome. setup.py writes cuda_failed.txt, the error message if compiling the kernels has failed.
set(mode "$ENV{CAMKD_FAST_CUDA}")
if(mode STREQUAL "")
  set(mode auto)
elseif(NOT mode MATCHES "^(auto|0|1)$")
  message(FATAL_ERROR "CAMKD_FAST_CUDA must be auto, 0 or 1, got ${mode}")
endif()

# A file instead of definitions, because a compiler's message could break a command line. WRITE expands nothing in it.
function(write_cuda_build built text)
  file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/cuda_build.h
       "#define CAMKD_CUDA ${built}\n#define CAMKD_CUDA_BUILD R\"words(${text})words\"\n")
  target_include_directories(_C PRIVATE ${CMAKE_CURRENT_BINARY_DIR})
endfunction()

set(failed "")
if(EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/cuda_failed.txt)
  file(READ ${CMAKE_CURRENT_SOURCE_DIR}/cuda_failed.txt failed)
endif()

# The version is asked for before CMake tries the compiler, which takes some seconds and is an error where it fails.
set(missing "")
if(mode STREQUAL "0")
  set(missing "CAMKD_FAST_CUDA=0 at build time")
elseif(NOT "${failed}" STREQUAL "")
  set(missing "the CUDA kernels did not compile: ${failed}")
else()
  find_program(nvcc NAMES "$ENV{CUDACXX}" nvcc HINTS ENV CUDA_PATH ENV CUDA_HOME PATH_SUFFIXES bin)
  set(version "")
  if(nvcc)
    execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE version RESULT_VARIABLE status ERROR_QUIET)
  endif()
  if(NOT version MATCHES "release [0-9.]+, V([0-9.]+)")
    set(missing "no working nvcc at build time (looked in PATH, CUDACXX, CUDA_PATH and CUDA_HOME)")
  elseif(CMAKE_MATCH_1 VERSION_LESS 12.8)
    set(missing "nvcc ${CMAKE_MATCH_1} at build time, but 12.8 is needed")
  else()
    message(STATUS "CUDA kernels: trying ${nvcc}")  # setup.py looks for this line
    set(CMAKE_CUDA_COMPILER ${nvcc})
    set(CMAKE_CUDA_ARCHITECTURES OFF)  # set below
    enable_language(CUDA)
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
target_sources(_C PRIVATE cuda/bindings.cpp python/cuda_calls.cpp python/cuda_features.cpp cuda/runtime.cpp
                          cuda/batch_mean.cu cuda/confidence.cu cuda/features.cu cuda/scale_rows.cu
                          cuda/any_formula/any_formula.cu cuda/row_loss/row_loss.cu
                          cuda/row_loss/f32.cu cuda/row_loss/bf16.cu cuda/row_loss/f16.cu)
set_source_files_properties(cuda/runtime.cpp PROPERTIES INCLUDE_DIRECTORIES "${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES}")
string(REPLACE ";" " " listed "${archs}")
write_cuda_build(1 "${listed}")
# The runtime is linked statically, so that importing the module needs neither a driver nor a toolkit.
set_target_properties(_C PROPERTIES CUDA_ARCHITECTURES "${archs}" CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
                                    CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
