// How the keys of a search are shared out to threads.
#pragma once

#include <atomic>
#include <vector>

#include "topk_search.h"

namespace clara_fast::cpu {

// Threads seldom get equal shares of a machine's memory, so each takes a piece when it has done the one
// before: long ones first, since long streams are read fastest, and short ones at the end, so that none waits
// for long. Where k is large every thread has one piece of each bank, since what it keeps would need room for
// all keys.
class KeyPieces {
 public:
  KeyPieces(const std::vector<KeyBank>& banks, int64_t threads, int64_t k)
      : banks_(banks), threads_(threads), in_turn_(k <= kMostInTurn), begins_(1) {
    for (const KeyBank& bank : banks) begins_.push_back(begins_.back() + ceil_div(bank.count, kKeyBlock));
    least_ = kLeastBytes / std::max<int64_t>(1, banks[0].rows.stride * kKeyBlock) + 1;
  }

  // What a thread may get in all, at most.
  int64_t most_keys() const {
    int64_t keys = 0;
    for (size_t b = 0; b < banks_.size(); ++b)
      keys += in_turn_ ? banks_[b].count : ceil_div(blocks(b), threads_) * kKeyBlock;
    return keys;
  }

  // search(bank, begin, end) for each piece that falls to a thread, in order.
  template <class Search>
  void each(int64_t thread, const Search& search) {
    const auto searched = [&](size_t bank, int64_t block, int64_t count) {
      search(bank, block * kKeyBlock, std::min(banks_[bank].count, (block + count) * kKeyBlock));
    };
    for (size_t b = 0; b < banks_.size() && !in_turn_; ++b) {
      const int64_t share = ceil_div(blocks(b), threads_), begin = thread * share;
      if (begin < blocks(b)) searched(b, begin, share);
    }
    if (!in_turn_) return;
    size_t bank = 0;
    for (int64_t block = next_; block < begins_.back();) {
      while (block >= begins_[bank + 1]) ++bank;
      // Threads read the same bank as far as they can: where pages are let go, few are held at a time.
      const int64_t most =
          std::min(ceil_div(blocks(bank), threads_), (begins_.back() - block) / (kShare * threads_));
      const int64_t count = std::min(std::max(least_, most), begins_[bank + 1] - block);
      if (!next_.compare_exchange_weak(block, block + count)) continue;
      searched(bank, block - begins_[bank], count);
      block = next_;
    }
  }

 private:
  static constexpr int64_t kMostInTurn = 1024;
  static constexpr int64_t kLeastBytes = 1 << 18;
  static constexpr int64_t kShare = 4;  // of a thread in what is left, that it takes at a time

  int64_t blocks(size_t bank) const { return begins_[bank + 1] - begins_[bank]; }

  const std::vector<KeyBank>& banks_;
  const int64_t threads_;
  const bool in_turn_;
  std::vector<int64_t> begins_;  // of each bank, in blocks of kKeyBlock keys, and behind it the end
  int64_t least_;
  std::atomic<int64_t> next_{0};
};

}  // namespace clara_fast::cpu
