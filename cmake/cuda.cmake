# Decides whether the CUDA library is built, says so in one line, and enables the language if it is.
# Sets CLARA_FAST_WITH_CUDA, CLARA_FAST_CUDA_VERSION (nvcc's) and CLARA_FAST_CUDA_ARCHITECTURES_BUILT.
#
# AUTO builds it where the torch found is a CUDA build and nvcc is there, so that an install over a CPU torch stays quick.
# ON wants nvcc only: neither a GPU nor a CUDA build of torch is needed to build.

set(CLARA_FAST_BUILD_CUDA "" CACHE STRING
    "Build the CUDA library: AUTO, ON or OFF; empty: the environment variable of the same name, or AUTO")
set(CLARA_FAST_CUDA_ARCHITECTURES "" CACHE STRING
    "CMake's list of CUDA architectures; empty: the environment variable of the same name, or all supported")

set(build_cuda "${CLARA_FAST_BUILD_CUDA}")
if(build_cuda STREQUAL "")
  set(build_cuda "$ENV{CLARA_FAST_BUILD_CUDA}")
endif()
if(build_cuda STREQUAL "")
  set(build_cuda AUTO)
endif()
string(TOUPPER "${build_cuda}" build_cuda)
if(NOT build_cuda MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "CLARA_FAST_BUILD_CUDA (${build_cuda}) must be AUTO, ON or OFF")
endif()

set(architectures "${CLARA_FAST_CUDA_ARCHITECTURES}")
if(architectures STREQUAL "")
  set(architectures "$ENV{CLARA_FAST_CUDA_ARCHITECTURES}")
endif()
if(architectures STREQUAL "")
  set(architectures "80-real;90a-real;100a-real;120")  # the last also as PTX, for what comes after it
endif()

set(torch_cuda "")
if(EXISTS "${torch_include}/../version.py")
  file(STRINGS "${torch_include}/../version.py" torch_cuda REGEX "^cuda.*[0-9]")
endif()

set(CLARA_FAST_WITH_CUDA 0)
set(CLARA_FAST_CUDA_VERSION "")
set(CLARA_FAST_CUDA_ARCHITECTURES_BUILT "")
set(reason "")
if(build_cuda STREQUAL "OFF")
  set(reason "CLARA_FAST_BUILD_CUDA is OFF")
elseif(build_cuda STREQUAL "AUTO" AND NOT torch_cuda)
  set(reason "the torch found is not a CUDA build (CLARA_FAST_BUILD_CUDA=ON builds it all the same)")
elseif(NOT torch_fits)
  set(reason "it needs the headers of torch >= ${CLARA_FAST_TORCH_TARGET}, found: ${torch_version}")
else()
  include(CheckLanguage)
  set(CMAKE_CUDA_ARCHITECTURES "${architectures}")
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(CLARA_FAST_WITH_CUDA 1)
    set(CLARA_FAST_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
    set(CLARA_FAST_CUDA_ARCHITECTURES_BUILT "${architectures}")
  else()
    set(reason "nvcc was not found (CUDACXX may name it)")
  endif()
endif()

if(CLARA_FAST_WITH_CUDA)
  message(STATUS "clara_fast: CUDA library by nvcc ${CLARA_FAST_CUDA_VERSION} for ${architectures}")
elseif(build_cuda STREQUAL "ON")
  message(FATAL_ERROR "clara_fast: CLARA_FAST_BUILD_CUDA is ON, but ${reason}")
else()
  message(STATUS "clara_fast: no CUDA library in this build: ${reason}")
endif()
