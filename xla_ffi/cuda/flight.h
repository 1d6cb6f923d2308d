// A device's flights: the host's part of cuda/flight.h.
#ifndef LPLB_XLA_FFI_CUDA_FLIGHT_H_
#define LPLB_XLA_FFI_CUDA_FLIGHT_H_

#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda/flight.h"
#include "xla_ffi/cuda/resources.h"

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

// Where an array of copies comes to.
struct FlightResult {
  char* data;
  int64_t bytes;
};

// Flights of one device, in the order in which it starts and takes them. CUDA calls are made with
// that device current; where one fails, std::runtime_error is thrown. Start and Take return what is
// wrong with their arguments, "" if nothing is.
class Flights {
 public:
  // The size of hangars with room for two flights of so many bytes.
  static int64_t HangarBytes(int64_t copy_bytes);

  // `bytes` is the size of every hangar.
  Flights(const cuda::Peers& peers, const std::vector<uintptr_t>& hangars, int64_t bytes);

  // Adds a route, and returns its number.
  int64_t AddRoute(FlightRoute route);
  // Sends n_copies experts of each array, forwards or against the route's direction. `number` is on
  // the device, and is for Take.
  std::string Start(int64_t route, bool against, int32_t n_copies,
                    const std::vector<FlightArray>& arrays, float* number, cudaStream_t stream);
  // Takes the oldest flight that was not taken: n_copies experts into each array.
  std::string Take(const float* number, const std::vector<FlightResult>& into, cudaStream_t stream);

 private:
  // Of a flight, in every hangar.
  struct Place {
    uint32_t number;
    int64_t begin;
    int64_t end;
  };
  struct Flight {
    Place place;
    std::vector<int64_t> bytes;  // of each array, all copies
    cuda::FlightRanks from;
    Event left;  // what this rank sends has left
  };

  Event TakeEvent();
  // The place of the next flight, and the number of the last one that overlapped it.
  std::pair<Place, uint32_t> NextPlace(int64_t n_bytes);

  static constexpr size_t kMostPlaced = 64;

  cuda::Hangars hangars_ = {};
  std::vector<char*> all_;
  int64_t bytes_;
  DeviceMemory table_;
  Stream beside_ = MakeStream();
  Event fork_ = MakeEvent();
  std::vector<Event> idle_;
  std::mutex mutex_;
  std::vector<FlightRoute> routes_;
  std::deque<Place> placed_;  // the last ones
  std::deque<Flight> flying_;
  uint32_t last_ = 0;
  uint32_t forgotten_ = 0;  // the last flight that is no longer in placed_
  int64_t cursor_ = 0;
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CUDA_FLIGHT_H_
