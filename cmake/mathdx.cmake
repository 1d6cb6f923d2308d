# The interior point with cuSolverDx's factor, too (factor="cusolverdx"): LPLB_MATHDX=on. For
# benchmarks: the library's own factor is faster at every size, see docs/solvers.md.
if(LPLB_MATHDX STREQUAL "off")
  return()
elseif(NOT LPLB_MATHDX STREQUAL "on")
  message(FATAL_ERROR "LPLB_MATHDX is '${LPLB_MATHDX}'; it can be off or on.")
endif()

set(mathdx ${PROJECT_BINARY_DIR}/mathdx)
if(NOT EXISTS ${mathdx}/cusolverdx.fatbin OR
    ${PROJECT_SOURCE_DIR}/cmake/mathdx.py IS_NEWER_THAN ${mathdx}/cusolverdx.fatbin)
  execute_process(COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/mathdx.py ${mathdx}
    RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "LPLB_MATHDX=on, but libmathdx did not work. Build with isolation, or "
      "install what tool.scikit-build.overrides in pyproject.toml lists.")
  endif()
endif()

# cuSolverDx comes as link-time IR, which is linked and compiled with the kernels of this library
# alone. For compute capability 9.0 only.
add_library(lplb_mathdx STATIC cuda/mathdx/ipm_cusolverdx.cu)
set_target_properties(lplb_mathdx PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
  CUDA_VISIBILITY_PRESET hidden CUDA_ARCHITECTURES 90-real CUDA_SEPARABLE_COMPILATION ON
  CUDA_RESOLVE_DEVICE_SYMBOLS ON INTERPROCEDURAL_OPTIMIZATION ON)
target_include_directories(lplb_mathdx PRIVATE ${PROJECT_SOURCE_DIR})
target_compile_options(lplb_mathdx PRIVATE --expt-relaxed-constexpr)
file(GLOB generated ${mathdx}/*.ltoir ${mathdx}/*.fatbin)
foreach(file ${generated})
  target_link_options(lplb_mathdx PRIVATE $<DEVICE_LINK:${file}>)
endforeach()
target_compile_definitions(lplb_kernels PRIVATE LPLB_MATHDX)
target_link_libraries(lplb_kernels PRIVATE lplb_mathdx)
