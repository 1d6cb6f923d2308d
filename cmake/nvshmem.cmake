# lplb_jax/sync_put.fatbin: the kernel that reaches peers on other hosts, linked with NVSHMEM's device
# library of the wheel nvidia-nvshmem-cu13. It is loaded only where it is needed, so neither the build
# nor the package depends on NVSHMEM otherwise.
if(NOT LPLB_NVSHMEM MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "LPLB_NVSHMEM is '${LPLB_NVSHMEM}'; it can be auto, on or off.")
endif()
if(NOT LPLB_NVSHMEM STREQUAL "off")
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import nvidia.nvshmem as n; print(n.__path__[0], end='')"
    OUTPUT_VARIABLE nvshmem RESULT_VARIABLE missing ERROR_QUIET)
  if(missing AND LPLB_NVSHMEM STREQUAL "on")
    message(FATAL_ERROR "LPLB_NVSHMEM=on, but there is no nvidia-nvshmem-cu13 in the environment "
      "that builds. Install it there: pip install nvidia-nvshmem-cu13")
  endif()
endif()
if(LPLB_NVSHMEM STREQUAL "off" OR missing)
  message(STATUS "NVSHMEM's put: none (LPLB_NVSHMEM=${LPLB_NVSHMEM})")
  return()
endif()
message(STATUS "NVSHMEM's put: ${nvshmem}")

# Device code is linked for the same chips as the kernels above; a link takes machine code only.
set(chips)
foreach(architecture ${CMAKE_CUDA_ARCHITECTURES})
  string(REGEX MATCH "^[0-9]+" chip ${architecture})
  list(APPEND chips -gencode arch=compute_${chip},code=sm_${chip})
endforeach()
set(source ${PROJECT_SOURCE_DIR}/cuda/nvshmem/sync_put.cu)
set(object ${PROJECT_BINARY_DIR}/sync_put.o)
set(fatbin ${PROJECT_BINARY_DIR}/sync_put.fatbin)
add_custom_command(OUTPUT ${fatbin}
  COMMAND ${CMAKE_CUDA_COMPILER} -std=c++17 -O3 -rdc=true ${chips} -I${PROJECT_SOURCE_DIR}
    -isystem ${nvshmem}/include -c ${source} -o ${object}
  COMMAND ${CMAKE_CUDA_COMPILER} ${chips} -dlink -fatbin ${object}
    ${nvshmem}/lib/libnvshmem_device.a -o ${fatbin}
  DEPENDS ${source} ${PROJECT_SOURCE_DIR}/cuda/sync.cuh ${PROJECT_SOURCE_DIR}/cuda/sync.h VERBATIM)
add_custom_target(sync_put ALL DEPENDS ${fatbin})
install(FILES ${fatbin} DESTINATION lplb_jax)
