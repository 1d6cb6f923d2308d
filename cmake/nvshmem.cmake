# lplb_jax/put-nvshmem-X.Y.Z.fatbin: the kernels that reach peers on other hosts, linked with
# NVSHMEM's device library of the wheel nvidia-nvshmem-cu13, whose version its name tells: not every
# host library runs them. They are loaded only where they are needed, so neither the build nor the
# package depends on NVSHMEM otherwise.
if(NOT LPLB_NVSHMEM MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "LPLB_NVSHMEM is '${LPLB_NVSHMEM}'; it can be auto, on or off.")
endif()
if(NOT LPLB_NVSHMEM STREQUAL "off")
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import nvidia.nvshmem as n; print(n.__path__[0], end='')"
    OUTPUT_VARIABLE nvshmem RESULT_VARIABLE missing ERROR_QUIET)
  if(missing AND LPLB_NVSHMEM STREQUAL "on")
    message(FATAL_ERROR "LPLB_NVSHMEM=on, but there is no nvidia-nvshmem-cu13 in the environment "
      "that builds. Build with isolation, or install what tool.scikit-build.overrides in "
      "pyproject.toml lists.")
  endif()
endif()
if(LPLB_NVSHMEM STREQUAL "off" OR missing)
  message(STATUS "NVSHMEM's put: none (LPLB_NVSHMEM=${LPLB_NVSHMEM})")
  return()
endif()
set(version_header ${nvshmem}/include/non_abi/nvshmem_version.h)
file(STRINGS ${version_header} found REGEX "define NVSHMEM_VENDOR_(MAJOR|MINOR|PATCH)_VERSION ")
string(REGEX REPLACE "[^;]*_VERSION +([0-9]+)" "\\1" nvshmem_version "${found}")
string(REPLACE ";" "." nvshmem_version "${nvshmem_version}")
if(NOT nvshmem_version MATCHES "^3\\.[0-9]+\\.[0-9]+$")
  message(FATAL_ERROR "NVSHMEM 3 is needed, and ${version_header} is of ${nvshmem_version}. Install "
    "what tool.scikit-build.overrides in pyproject.toml lists, or set LPLB_NVSHMEM=off.")
endif()
message(STATUS "NVSHMEM's put: ${nvshmem_version}, ${nvshmem}")

# Device code is linked for the same chips as the kernels above; a link takes machine code only.
set(chips)
foreach(architecture ${CMAKE_CUDA_ARCHITECTURES})
  string(REGEX MATCH "^[0-9]+" chip ${architecture})
  list(APPEND chips -gencode arch=compute_${chip},code=sm_${chip})
endforeach()
set(library ${nvshmem}/lib/libnvshmem_device.a)
set(fatbin ${PROJECT_BINARY_DIR}/put-nvshmem-${nvshmem_version}.fatbin)
set(objects)
foreach(name sync_put exchange_put)
  set(object ${PROJECT_BINARY_DIR}/${name}.o)
  add_custom_command(OUTPUT ${object}
    COMMAND ${CMAKE_CUDA_COMPILER} -std=c++17 -O3 -rdc=true ${chips} --expt-relaxed-constexpr
      $<$<BOOL:${LPLB_WERROR}>:--Werror=all-warnings> -I${PROJECT_SOURCE_DIR}
      -isystem ${nvshmem}/include -MD -MF ${object}.d
      -c ${PROJECT_SOURCE_DIR}/cuda/nvshmem/${name}.cu -o ${object}
    DEPENDS ${PROJECT_SOURCE_DIR}/cuda/nvshmem/${name}.cu ${library}
    DEPFILE ${object}.d VERBATIM COMMAND_EXPAND_LISTS)
  list(APPEND objects ${object})
endforeach()
add_custom_command(OUTPUT ${fatbin}
  COMMAND ${CMAKE_CUDA_COMPILER} ${chips} -dlink -fatbin ${objects} ${library} -o ${fatbin}
  DEPENDS ${objects} ${library} VERBATIM)
add_custom_target(put ALL DEPENDS ${fatbin})
install(FILES ${fatbin} DESTINATION lplb_jax COMPONENT put)
