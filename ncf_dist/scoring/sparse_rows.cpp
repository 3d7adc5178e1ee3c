// Adds the rows of a sparse item-to-item matrix to a block of scores, for sparse.py:
//
//   score(u, b) += Σ_j share_j · value(a_uj, b)    over the slots j of a user's history, in this order
//
// Blocks come in ascending order of place, and the items of a row ascend. So each (user, slot) keeps a cursor into its
// row, and a block takes the row's next stretch: nothing is sorted, copied or looked up, whatever the size of the
// catalogue. A product is rounded, then the sum (pyproject.toml forbids fused operations): torch's operations give the
// same bits.

#include <cstdint>

namespace {

constexpr int64_t kAhead = 8;  // Rows whose next stretch is fetched ahead.

template <bool kPlaces>
void add(const int32_t *items, const float *values, const int32_t *places, const float *shares, const int64_t *ends,
         int64_t *cursors, int64_t users, int64_t slots, int64_t first, int64_t limit, float *scores, int64_t width) {
  const int64_t pairs = users * slots;
  for (int64_t user = 0, pair = 0; user < users; user++) {
    float *__restrict const row = scores + user * width - first;
    for (int64_t slot = 0; slot < slots; slot++, pair++) {
      if (pair + kAhead < pairs) {
        __builtin_prefetch(items + cursors[pair + kAhead]);
        __builtin_prefetch(values + cursors[pair + kAhead]);
      }
      const float share = shares[slot];
      const int64_t end = ends[pair];
      int64_t at = cursors[pair];
      for (; at < end; at++) {
        const int64_t place = kPlaces ? places[items[at]] : items[at];
        if (place >= limit) break;
        if (!kPlaces || place >= first) row[place] += share * values[at];
      }
      cursors[pair] = at;
    }
  }
}

}  // namespace

extern "C" {

// items, values (S,): the rows, ascending by item. places: of each item in the catalogue, ascending, -1 for one that is
// not there; null where an item is its own place. shares (slots,), ends and cursors (users, slots). scores (users,
// width): those of places first … limit.
void add_sparse_rows(const int32_t *items, const float *values, const int32_t *places, const float *shares,
                     const int64_t *ends, int64_t *cursors, int64_t users, int64_t slots, int64_t first, int64_t limit,
                     float *scores, int64_t width) {
  const auto run = places ? add<true> : add<false>;
  run(items, values, places, shares, ends, cursors, users, slots, first, limit, scores, width);
}

}  // extern "C"
