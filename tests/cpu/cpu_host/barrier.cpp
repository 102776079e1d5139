// Barrier of csrc/cpu/sequence.h alone: in every round each thread writes a number of its own, and after the
// barrier reads its neighbour's. For ThreadSanitizer, to which a weaker memory order is a race.
// usage: barrier THREADS
#include <cstdlib>
#include <thread>
#include <vector>

#include "cpu/sequence.h"

int main(int, char** arguments) {
  const int n = std::atoi(arguments[1]), rounds = 200;
  fastlstm::Barrier barrier(n);
  std::vector<int> numbers(static_cast<size_t>(2 * n));  // of two rounds in turn, as the state h
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int k = 0; k < n; ++k)
    threads.emplace_back([&, k] {
      for (int round = 0; round < rounds; ++round) {
        int* const now = numbers.data() + round % 2 * n;
        now[k] = round * n + k;
        barrier.wait();
        const int neighbour = (k + 1) % n;
        if (now[neighbour] != round * n + neighbour) ++wrong;
      }
    });
  for (std::thread& thread : threads) thread.join();
  return wrong == 0 ? 0 : 1;
}
