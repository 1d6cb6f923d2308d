# Sets CMAKE_CUDA_COMPILER as the option LPLB_CUDA asks, or leaves it unset: no CUDA module.

# CMake cannot use the toolkit's wheels as they are: they have no lib64 and no unversioned
# libcudart.so, and the linker of devices looks for nvvm/lib64. So lay links over them; bin's files
# one by one, since nvcc looks for the rest of the toolkit beside the directory its own path leads
# to.
function(link_pypi_toolkit toolkit)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import nvidia.cu13; print(nvidia.cu13.__path__[0], end='')"
    OUTPUT_VARIABLE wheels RESULT_VARIABLE failed ERROR_QUIET)
  if(failed)
    message(FATAL_ERROR "LPLB_CUDA=pypi, but the toolkit is not installed. Build with isolation, "
      "or install what tool.scikit-build.overrides in pyproject.toml lists.")
  endif()
  file(REMOVE_RECURSE ${toolkit})
  file(MAKE_DIRECTORY ${toolkit}/bin ${toolkit}/lib64 ${toolkit}/nvvm)
  file(CREATE_LINK ../lib64 ${toolkit}/nvvm/lib64 SYMBOLIC)
  foreach(directory include nvvm/bin nvvm/libdevice)
    file(CREATE_LINK ${wheels}/${directory} ${toolkit}/${directory} SYMBOLIC)
  endforeach()
  file(GLOB programs RELATIVE ${wheels} ${wheels}/bin/*)
  foreach(program ${programs})
    file(CREATE_LINK ${wheels}/${program} ${toolkit}/${program} SYMBOLIC)
  endforeach()
  file(GLOB libraries ${wheels}/lib/lib*)
  foreach(library ${libraries})
    get_filename_component(name ${library} NAME)
    string(REGEX REPLACE "\\.so\\..*" ".so" plain_name ${name})
    file(CREATE_LINK ${library} ${toolkit}/lib64/${name} SYMBOLIC)
    file(CREATE_LINK ${library} ${toolkit}/lib64/${plain_name} SYMBOLIC)
  endforeach()
  file(CREATE_LINK lib64 ${toolkit}/lib SYMBOLIC)
endfunction()

if(LPLB_CUDA STREQUAL "off")
  unset(CMAKE_CUDA_COMPILER CACHE)
elseif(LPLB_CUDA STREQUAL "pypi")
  link_pypi_toolkit(${PROJECT_BINARY_DIR}/cuda-toolkit)
  set(CMAKE_CUDA_COMPILER ${PROJECT_BINARY_DIR}/cuda-toolkit/bin/nvcc CACHE FILEPATH "")
elseif(LPLB_CUDA MATCHES "^(auto|on)$")
  find_program(CMAKE_CUDA_COMPILER NAMES $ENV{CUDACXX} nvcc
    HINTS ENV CUDA_PATH ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
else()
  message(FATAL_ERROR "LPLB_CUDA is '${LPLB_CUDA}'; it can be auto, on, off or pypi.")
endif()

set(remedy "LPLB_CUDA=pypi takes the toolchain from PyPI, LPLB_CUDA=off builds for the CPU only.")
if(CMAKE_CUDA_COMPILER)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE found)
  if(NOT found MATCHES "release ([0-9.]+)" OR CMAKE_MATCH_1 VERSION_LESS 12.4)
    message(FATAL_ERROR
      "${CMAKE_CUDA_COMPILER} is no nvcc of CUDA 12.4 or newer; it says:\n${found}\n${remedy}")
  endif()
  message(STATUS "CUDA module: nvcc ${CMAKE_MATCH_1}, ${CMAKE_CUDA_COMPILER}\n"
    "   (if this nvcc fails below: ${remedy})")
elseif(LPLB_CUDA STREQUAL "on")
  message(FATAL_ERROR "LPLB_CUDA=on, but no nvcc is on PATH or in $CUDA_PATH/bin. ${remedy}")
else()
  message(STATUS "CUDA module: none (LPLB_CUDA=${LPLB_CUDA}; auto builds it where nvcc is found)")
endif()
