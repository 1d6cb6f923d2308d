// A device's flights: the host's part of cuda/flight.h.
#ifndef LPLB_XLA_FFI_CUDA_FLIGHT_H_
#define LPLB_XLA_FFI_CUDA_FLIGHT_H_

#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/flight.h"

namespace lplb {

// Which ranks send to one another along the columns of a topology: copy c is of column c modulo
// their number.
struct FlightRoute {
  std::vector<int32_t> to;
  std::vector<int32_t> from;
};

// One array of a flight: consecutive experts, of which the first leaves from `data`.
struct FlightArray {
  const char* data;
  int64_t bytes;  // of one expert
};

// Flights of one device, in the order in which it starts and takes them. CUDA calls are made with
// that device current.
class Flights {
 public:
  // The size of hangars with room for two flights of so many bytes.
  static int64_t HangarBytes(int64_t copy_bytes);

  // `bytes` is the size of every hangar. Throws std::runtime_error.
  Flights(const cuda::Peers& peers, const std::vector<uintptr_t>& hangars, int64_t bytes);
  ~Flights();
  Flights(const Flights&) = delete;

  // Adds a route, and returns its number.
  int64_t AddRoute(FlightRoute route);
  // Sends n_copies experts of each array, forwards or against the route's direction. `number` is on
  // the device, and is for Take.
  std::string Start(int64_t route, bool against, int32_t n_copies,
                    const std::vector<FlightArray>& arrays, float* number, cudaStream_t stream);
  // Takes the oldest flight that was not taken: n_copies experts into each array.
  std::string Take(const float* number, const std::vector<char*>& into, cudaStream_t stream);

 private:
  struct Flight {
    uint32_t number;
    int64_t begin;  // in every hangar
    int64_t end;
    std::vector<int64_t> bytes;  // of each array, all copies
    cuda::FlightRanks from;
    cudaEvent_t left;  // what this rank sends has left
  };

  cudaError_t TakeEvent(cudaEvent_t* event);
  // Sets the place of a flight; returns the number of the last flight that overlapped it.
  uint32_t Place(Flight* flight, int64_t n_bytes);

  static constexpr size_t kMostPlaced = 64;

  cuda::Hangars hangars_ = {};
  std::vector<char*> all_;
  void* table_ = nullptr;
  int64_t bytes_;
  cudaStream_t beside_ = nullptr;
  cudaEvent_t fork_ = nullptr;
  std::vector<cudaEvent_t> idle_;  // events
  std::mutex mutex_;
  std::vector<FlightRoute> routes_;
  std::deque<Flight> placed_;  // the last ones
  std::deque<Flight> flying_;
  uint32_t last_ = 0;
  uint32_t forgotten_ = 0;  // the last flight that is no longer in placed_
  int64_t cursor_ = 0;
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CUDA_FLIGHT_H_
