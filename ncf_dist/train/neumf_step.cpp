// One training step of GMF, MLP or NeuMF on a CPU, for compiled.py: the loss and all gradients in one call.
//
//   score(u, i) = Σ_f h_f p_uf q_if + w · x_L + b,   x_1 = ReLU(U p'_u + V q'_i + c_1),  x_l = ReLU(W_l x_(l-1) + c_l)
//
// A step has `rows` users with `items` items each, the positive first: n = rows · items pairs.
//
// - The first layer is computed once a row, and once a pair; once an item of the catalogue where these are fewer.
// - Pairs are then computed forward and backward in blocks that stay in a core's cache.
// - Gradients of a table are left a row a pair (those of V q'_i a catalogue a thread) and added up afterwards, each
//   thread its own range of the table. So no two threads write one place, and with the same number of threads the same
//   input gives the same bits.
// - Matrices are padded to whole vectors: ld is a row's length in memory, and what lies past its width means nothing.
//
// Built by setuptools for AVX2 and for AVX-512 (pyproject.toml). OpenMP's threads are torch's: one library, one pool.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

using Index = int64_t;

extern "C" {

// A parameter, and where its gradient begins in Step's gradients.
struct Parameter {
  const float *values;
  Index gradient;
};

struct Side {
  Index count, dim;
  Parameter table;  // (count, dim)
};

struct Layer {
  Index out;
  Parameter weight, bias;  // (out, in), (out,)
};

struct Step {
  Index rows, items, factors, layers, threads, pairwise;  // pairwise: BPR, else BCE
  const Index *user, *item;                               // (rows,), (rows, items)
  Side gmf_user, gmf_item, deep_user, deep_item;          // the first two where there are factors, the others layers
  Parameter gmf_weight, output_weight, bias;              // h (factors,), w (width of the last layer,), b (1,)
  const Layer *layer;                                     // The input of the first is [p'_u; q'_i].
  float *gradients;                                       // written
};

}  // extern "C"

namespace {

#ifdef __AVX512F__
constexpr Index kLanes = 16, kTile = 8;
#else
constexpr Index kLanes = 8, kTile = 4;
#endif
constexpr Index kBlock = 128;  // Pairs of a block, about.
constexpr Index kAhead = 8;    // Rows that a look-up is fetched ahead.
constexpr Index kHeight = 4;   // Rows of `outer` at a time.

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef float Eight __attribute__((vector_size(8 * sizeof(float)), aligned(4), may_alias));  // For tables: short rows.

inline Lanes &lanes(float *at) { return *reinterpret_cast<Lanes *>(at); }
inline const Lanes &lanes(const float *at) { return *reinterpret_cast<const Lanes *>(at); }
inline Eight &eight(float *at) { return *reinterpret_cast<Eight *>(at); }
inline const Eight &eight(const float *at) { return *reinterpret_cast<const Eight *>(at); }

Index up(Index n, Index to) { return (n + to - 1) / to * to; }

// `value` where the unit x is on. A NaN is on, as in torch.
inline Lanes where_on(Lanes x, Lanes value) { return x <= 0.f ? Lanes{} : value; }

// Memory that is kept from step to step.
template <typename T>
T *kept(Index size) {
  thread_local std::vector<T> memory;
  if (memory.size() < static_cast<size_t>(size)) memory.resize(size);
  return memory.data();
}

// y (n, ldy) = x (n, ldx) · w (k, ldy) + b, in whole tiles: rows of y up to up(n, kTile) are written.
template <int V>
void product_panel(const float *x, Index ldx, Index n, Index k, const float *w, const float *b, float *y, Index ldy) {
  for (Index e = 0; e < n; e += kTile) {
    Lanes sum[kTile][V];
    for (int v = 0; v < V; v++)
      for (int r = 0; r < kTile; r++) sum[r][v] = b ? lanes(b + v * kLanes) : Lanes{};
    for (Index j = 0; j < k; j++)
      for (int v = 0; v < V; v++) {
        const Lanes c = lanes(w + j * ldy + v * kLanes);
        for (int r = 0; r < kTile; r++) sum[r][v] += x[(e + r) * ldx + j] * c;
      }
    for (int r = 0; r < kTile; r++)
      for (int v = 0; v < V; v++) lanes(y + (e + r) * ldy + v * kLanes) = sum[r][v];
  }
}

void product(const float *x, Index ldx, Index n, Index k, const float *w, const float *b, float *y, Index ldy) {
  Index c = 0;
  for (; c + 2 * kLanes <= ldy; c += 2 * kLanes) product_panel<2>(x, ldx, n, k, w + c, b ? b + c : b, y + c, ldy);
  if (c < ldy) product_panel<1>(x, ldx, n, k, w + c, b ? b + c : b, y + c, ldy);
}

// g (up(out, kHeight), ldx) += dᵀ · x for d (n, ldd), x (n, ldx)
template <int V>
void outer_panel(const float *d, Index ldd, const float *x, Index ldx, Index n, Index out, float *g) {
  for (Index o = 0; o < out; o += kHeight) {
    Lanes sum[kHeight][V];
    for (int r = 0; r < kHeight; r++)
      for (int v = 0; v < V; v++) sum[r][v] = lanes(g + (o + r) * ldx + v * kLanes);
    for (Index e = 0; e < n; e++)
      for (int v = 0; v < V; v++) {
        const Lanes c = lanes(x + e * ldx + v * kLanes);
        for (int r = 0; r < kHeight; r++) sum[r][v] += d[e * ldd + o + r] * c;
      }
    for (int r = 0; r < kHeight; r++)
      for (int v = 0; v < V; v++) lanes(g + (o + r) * ldx + v * kLanes) = sum[r][v];
  }
}

void outer(const float *d, Index ldd, const float *x, Index ldx, Index n, Index out, float *g) {
  Index c = 0;
  for (; c + 2 * kLanes <= ldx; c += 2 * kLanes) outer_panel<2>(d, ldd, x + c, ldx, n, out, g + c);
  if (c < ldx) outer_panel<1>(d, ldd, x + c, ldx, n, out, g + c);
}

// to (ld,) += the sum of the rows of d (n, ld)
void add_rows(const float *d, Index ld, Index n, float *to) {
  for (Index c = 0; c < ld; c += kLanes) {
    Lanes sum = lanes(to + c);
    for (Index e = 0; e < n; e++) sum += lanes(d + e * ld + c);
    lanes(to + c) = sum;
  }
}

inline void fetch(const float *row, Index dim) {
  for (Index k = 0; k < dim; k += 16) __builtin_prefetch(row + k);
}

inline void add(float *to, const float *row, Index dim) {
  Index k = 0;
  for (; k + 8 <= dim; k += 8) eight(to + k) += eight(row + k);
  for (; k < dim; k++) to[k] += row[k];
}

// Σ_k h_k p_k q_k
inline float weighted_dot(const float *h, const float *p, const float *q, Index dim) {
  Eight several{};
  float sum = 0.f;
  Index k = 0;
  for (; k + 8 <= dim; k += 8) several += eight(h + k) * eight(p + k) * eight(q + k);
  for (; k < dim; k++) sum += h[k] * p[k] * q[k];
  for (int v = 0; v < 8; v++) sum += several[v];
  return sum;
}

// to (n, ld) = rows index[0…n) of the table; without an index its rows first…first + n.
void gather(const Side &side, const Index *index, Index first, Index n, float *to, Index ld) {
  for (Index e = 0; e < n; e++) {
    if (index) fetch(side.table.values + index[std::min(e + kAhead, n - 1)] * side.dim, side.dim);
    std::memcpy(to + e * ld, side.table.values + (index ? index[e] : first + e) * side.dim, side.dim * sizeof(float));
  }
}

// Row r of table (·, dim), from ≤ r < to, = the sum of those of rows (n, ld) whose index is r. own: room for n numbers.
void scatter(const float *rows, Index ld, const Index *index, Index n, Index from, Index to, float *table, Index dim,
             Index *own) {
  std::memset(table + from * dim, 0, (to - from) * dim * sizeof(float));
  Index count = 0;
  for (Index e = 0; e < n; e++) {  // Without a branch, which would be guessed wrong half the time.
    own[count] = e;
    count += index[e] >= from && index[e] < to;
  }
  for (Index k = 0; k < count; k++) {
    fetch(table + index[own[std::min(k + kAhead, count - 1)]] * dim, dim);
    add(table + index[own[k]] * dim, rows + own[k] * ld, dim);
  }
}

// Σ log(1 + x) for 0 ≤ x ≤ 1, with one logarithm for many.
class Tails {
 public:
  void add(float x) {
    product *= 1.0 + x;
    if (++count % 512 == 0) logs += std::log(product), product = 1;
  }
  double sum() const { return logs + std::log(product); }

 private:
  double product = 1, logs = 0;
  Index count = 0;
};

// A layer, or a half of the first one, padded: forward (in, ldo), backward (out, ldi), bias (ldo,). Among a thread's
// gradients its own begin at `at`: weight (up(out, kHeight), ldi), then bias (ldo,).
struct Weights {
  Index in, out, ldi, ldo, at;
  std::vector<float> forward, backward, bias;

  // w (out, stride), of which the first `in` columns; b may be null; size: of the gradients so far.
  Weights(const float *w, Index stride, const float *b, Index in, Index out, Index &size)
      : in(in), out(out), ldi(up(in, kLanes)), ldo(up(out, kLanes)), at(size), forward(in * ldo), backward(out * ldi),
        bias(ldo) {
    size += up(out, kHeight) * ldi + ldo;
    for (Index o = 0; o < out; o++)
      for (Index k = 0; k < in; k++) forward[k * ldo + o] = backward[o * ldi + k] = w[o * stride + k];
    if (b) std::copy_n(b, out, bias.begin());
  }
  void times(const float *x, Index n, float *y) const { product(x, ldi, n, in, forward.data(), bias.data(), y, ldo); }
  void times_transposed(const float *d, Index n, float *y) const {
    product(d, ldo, n, out, backward.data(), nullptr, y, ldi);
  }
  void add_gradients(const float *d, const float *x, Index n, float *g) const {
    outer(d, ldo, x, ldi, n, out, g + at);
    add_rows(d, ldo, n, g + at + up(out, kHeight) * ldi);
  }
  void hand_out(const float *g, float *weight, Index stride, float *bias_to) const {
    for (Index o = 0; o < out; o++) std::copy_n(g + at + o * ldi, in, weight + o * stride);
    if (bias_to) std::copy_n(g + at + up(out, kHeight) * ldi, out, bias_to);
  }
};

// One side of the first layer, for n rows of its table.
struct Projection {
  const Side &side;
  const Weights &weights;
  const Index *index;  // (n,); null: all rows of the table
  Index n;
  float *hidden, *gradient, *rows;  // (n, ldo) W x, (n, ldo) its gradient, (n, ldi) the gradient of x; in whole tiles

  void forward(Index from, Index to, float *x) const {
    for (Index r = from; r < to; r += kBlock) {
      const Index m = std::min(kBlock, to - r);
      gather(side, index ? index + r : nullptr, r, m, x, weights.ldi);
      weights.times(x, m, hidden + r * weights.ldo);
    }
  }
  void backward(Index from, Index to, float *x, float *g) const {
    for (Index r = from; r < to; r += kBlock) {
      const Index m = std::min(kBlock, to - r);
      gather(side, index ? index + r : nullptr, r, m, x, weights.ldi);
      weights.add_gradients(gradient + r * weights.ldo, x, m, g);
      weights.times_transposed(gradient + r * weights.ldo, m, rows + r * weights.ldi);
    }
  }
  void to_table(Index from, Index to, float *table, Index *own) const {
    if (index) return scatter(rows, weights.ldi, index, n, from, to, table, side.dim, own);
    for (Index r = from; r < to; r++)
      std::memcpy(table + r * side.dim, rows + r * weights.ldi, side.dim * sizeof(float));
  }
};

class OneStep {
 public:
  explicit OneStep(const Step &step)
      : s(step), items(step.items), n(step.rows * items), deep(step.layers > 0),
        catalogue(deep && step.deep_item.count <= n), each(std::max<Index>(kTile, kBlock / items / kTile * kTile)) {
    const Index user = s.deep_user.dim, item = s.deep_item.dim;
    for (Index l = 0; l < s.layers; l++) {
      const Layer &layer = s.layer[l];
      if (l == 0) {
        weights.emplace_back(layer.weight.values, user + item, layer.bias.values, user, layer.out, gradients);
        weights.emplace_back(layer.weight.values + user, user + item, nullptr, item, layer.out, gradients);
      } else {
        const Index in = weights.back().out;
        weights.emplace_back(layer.weight.values, in, layer.bias.values, in, layer.out, gradients);
      }
    }
    if (deep) {
      output.resize(weights.back().ldo);
      std::copy_n(s.output_weight.values, weights.back().out, output.begin());
    }
    for (const Weights &layer : weights) widest = std::max({widest, layer.ldi, layer.ldo});
    output_at = gradients, gmf_at = output_at + static_cast<Index>(output.size()), bias_at = gmf_at + s.factors;
    gradients = up(bias_at + 1, kLanes);
    share_out();
  }

  // The mean loss; all gradients are where the step wants them.
  double run() {
    std::vector<double> loss(s.threads);
    std::vector<float> gradient(s.threads * gradients);
#pragma omp parallel num_threads(s.threads)
    {
      const Index t = omp_get_thread_num(), threads = omp_get_num_threads();
      const auto from = [=](Index count) { return count * t / threads; };
      const auto to = [=](Index count) { return count * (t + 1) / threads; };
      // In whole blocks: what a tile writes past the end is never another thread's.
      const auto block_from = [=](Index count) { return from(up(count, kBlock) / kBlock) * kBlock; };
      const auto block_to = [=](Index count) { return std::min(count, to(up(count, kBlock) / kBlock) * kBlock); };
      float *const room = rooms + t * room_size, *const g = gradient.data() + t * gradients;
      Index *const own = numbers + t * n;
      for (const Projection &side : sides) side.forward(block_from(side.n), block_to(side.n), room);
      if (catalogue) std::fill_n(item_gradient + t * catalogue_size, catalogue_size, 0.f);
#pragma omp barrier
      const Index blocks = up(s.rows, each) / each;
      for (Index k = from(blocks); k < to(blocks); k++)
        loss[t] += block(k * each, std::min(s.rows, (k + 1) * each), room, g, item_gradient + t * catalogue_size);
#pragma omp barrier
      if (s.factors) {
        const Index users = s.gmf_user.count, all = s.gmf_item.count, f = s.factors;
        scatter(gmf_user, f, s.user, s.rows, from(users), to(users), gradient_of(s.gmf_user.table), f, own);
        scatter(gmf_item, f, s.item, n, from(all), to(all), gradient_of(s.gmf_item.table), f, own);
      }
      for (Index other = 1; catalogue && other < threads; other++) {
        const Index first = from(catalogue_size), count = to(catalogue_size) - first;
        add(item_gradient + first, item_gradient + other * catalogue_size + first, count);
      }
#pragma omp barrier
      for (const Projection &side : sides) side.backward(block_from(side.n), block_to(side.n), room, g);
#pragma omp barrier
      for (const Projection &side : sides)
        side.to_table(from(side.side.count), to(side.side.count), gradient_of(side.side.table), own);
    }
    for (Index t = 1; t < s.threads; t++) {
      loss[0] += loss[t];
      for (Index k = 0; k < gradients; k++) gradient[k] += gradient[t * gradients + k];
    }
    hand_out(gradient.data());
    return loss[0] / terms();
  }

 private:
  const Step &s;
  const Index items, n;
  const bool deep, catalogue;  // whether there is a tower; whether its item side is computed for the whole catalogue
  const Index each;            // rows of a block
  std::vector<Weights> weights;  // the first layer's user half and item half, then the other layers
  std::vector<float> output;     // w, padded
  std::vector<Projection> sides;
  Index gradients = 0, output_at, gmf_at, bias_at;  // of a thread: its size, and where w's, h's and b's are
  Index widest = 0, room_size;
  Index catalogue_size = 0;  // of the gradient of V q'_i for all items, of which each thread has one
  float *rooms, *item_gradient, *gmf_user, *gmf_item;
  Index *numbers;

  float *gradient_of(const Parameter &parameter) const { return s.gradients + parameter.gradient; }
  double terms() const { return static_cast<double>(s.pairwise ? s.rows * (items - 1) : n); }

  // Cut the kept memory into what the step needs.
  void share_out() {
    const Index block = up(each * items, kTile), users = up(s.rows, kTile), pairs = up(n, kTile);
    const Index projected = catalogue ? up(s.deep_item.count, kTile) : pairs;
    const Index hidden = deep ? weights[0].ldo : 0, user = deep ? weights[0].ldi : 0, item = deep ? weights[1].ldi : 0;
    room_size = std::max(block * (2 + 2 * widest), kBlock * widest);
    for (size_t l = 1; l < weights.size(); l++) room_size += block * weights[l].ldo;
    catalogue_size = catalogue ? projected * hidden : 0;
    const Index gradient = catalogue ? s.threads * catalogue_size : pairs * hidden;
    numbers = kept<Index>(s.threads * n);
    float *at = kept<float>(s.threads * room_size + (users + pairs) * s.factors + users * (2 * hidden + user) +
                            projected * (hidden + item) + gradient);
    const auto take = [&at](Index size) { return at += size, at - size; };
    rooms = take(s.threads * room_size);
    gmf_user = take(users * s.factors);
    gmf_item = take(pairs * s.factors);
    item_gradient = take(gradient);
    if (!deep) return;
    const auto side = [&](const Side &of, const Weights &half, const Index *index, Index count, Index tiles, float *d) {
      float *const values = take(tiles * half.ldo);
      sides.push_back({of, half, index, count, values, d, take(tiles * half.ldi)});
    };
    side(s.deep_user, weights[0], s.user, s.rows, users, take(users * hidden));
    const Index *const index = catalogue ? nullptr : s.item;
    side(s.deep_item, weights[1], index, catalogue ? s.deep_item.count : n, projected, item_gradient);
  }

  // The loss of rows b0…b1, summed, and their gradients: those of the layers are added to g.
  double block(Index b0, Index b1, float *room, float *g, float *catalogue_gradient) const {
    const Index m = (b1 - b0) * items, size = up(each * items, kTile);
    float *const score = room, *const slope = score + size;
    float *const spare[] = {slope + size, slope + size * (1 + widest)};
    std::vector<float *> x;
    float *next = slope + size * (1 + 2 * widest);
    for (size_t l = 1; l < weights.size(); l++) x.push_back(next), next += size * weights[l].ldo;

    gmf_scores(b0, b1, score);
    if (deep) tower_scores(b0, b1, x, score);
    const double loss = s.pairwise ? bpr(m, score, slope) : bce(m, score, slope);
    for (Index e = 0; e < m; e++) g[bias_at] += slope[e];
    gmf_gradients(b0, b1, slope, g + gmf_at);
    if (deep) tower_gradients(b0, b1, x, slope, spare, g, catalogue_gradient);
    return loss;
  }

  void gmf_scores(Index b0, Index b1, float *score) const {
    const Index f = s.factors;
    for (Index b = b0, pair = b0 * items; b < b1; b++)
      for (Index j = 0; j < items; j++, pair++) {
        float sum = s.bias.values[0];
        if (f) {
          fetch(s.gmf_item.table.values + s.item[std::min(pair + kAhead, n - 1)] * f, f);
          const float *p = s.gmf_user.table.values + s.user[b] * f, *q = s.gmf_item.table.values + s.item[pair] * f;
          sum += weighted_dot(s.gmf_weight.values, p, q, f);
        }
        *score++ = sum;
      }
  }

  void tower_scores(Index b0, Index b1, const std::vector<float *> &x, float *score) const {
    const Index hidden = weights[0].ldo, m = (b1 - b0) * items;
    for (Index b = b0, e = 0; b < b1; b++)
      for (Index j = 0; j < items; j++, e++) {
        const Index pair = b * items + j;
        if (catalogue) fetch(sides[1].hidden + s.item[std::min(pair + kAhead, n - 1)] * hidden, hidden);
        const float *p = sides[0].hidden + b * hidden;
        const float *q = sides[1].hidden + (catalogue ? s.item[pair] : pair) * hidden;
        for (Index k = 0; k < hidden; k += kLanes) {
          const Lanes sum = lanes(p + k) + lanes(q + k);
          lanes(x[0] + e * hidden + k) = where_on(sum, sum);
        }
      }
    for (size_t l = 1; l < x.size(); l++) {
      weights[l + 1].times(x[l - 1], m, x[l]);
      for (Index k = 0; k < m * weights[l + 1].ldo; k += kLanes) {
        Lanes &units = lanes(x[l] + k);
        units = where_on(units, units);
      }
    }
    const Index width = weights.back().ldo;
    for (Index e = 0; e < m; e++) {
      Lanes sum{};
      for (Index k = 0; k < width; k += kLanes) sum += lanes(output.data() + k) * lanes(x.back() + e * width + k);
      for (Index v = 0; v < kLanes; v++) score[e] += sum[v];
    }
  }

  // losses.bce of m scores z. slope: its gradient in z.
  double bce(Index m, const float *z, float *slope) const {
    double sum = 0;
    Tails tails;
    const float share = static_cast<float>(1 / terms());
    for (Index e = 0; e < m; e++) {
      const float label = e % items ? 0.f : 1.f, tail = std::exp(-std::abs(z[e]));
      sum += std::max(z[e], 0.f) - z[e] * label;
      tails.add(tail);
      slope[e] = ((z[e] < 0.f ? tail : 1.f) / (1.f + tail) - label) * share;
    }
    return sum + tails.sum();
  }

  // losses.bpr, likewise.
  double bpr(Index m, const float *z, float *slope) const {
    double sum = 0;
    Tails tails;
    const float share = static_cast<float>(1 / terms());
    for (Index first = 0; first < m; first += items) {
      slope[first] = 0.f;
      for (Index e = first + 1; e < first + items; e++) {
        const float lead = z[first] - z[e], tail = std::exp(-std::abs(lead));
        sum += std::max(-lead, 0.f);
        tails.add(tail);
        slope[e] = (lead < 0.f ? 1.f : tail) / (1.f + tail) * share;
        slope[first] -= slope[e];
      }
    }
    return sum + tails.sum();
  }

  void gmf_gradients(Index b0, Index b1, const float *slope, float *weight) const {
    const Index f = s.factors;
    const float *const h = s.gmf_weight.values;
    for (Index b = b0, pair = b0 * items; f && b < b1; b++) {
      const float *p = s.gmf_user.table.values + s.user[b] * f;
      float *user = gmf_user + b * f;
      std::fill_n(user, f, 0.f);
      for (Index j = 0; j < items; j++, pair++) {
        const float d = *slope++, *q = s.gmf_item.table.values + s.item[pair] * f;
        float *item = gmf_item + pair * f;
        Index k = 0;
        for (; k + 8 <= f; k += 8) {
          eight(user + k) += d * eight(q + k);
          eight(item + k) = d * eight(h + k) * eight(p + k);
        }
        for (; k < f; k++) {
          user[k] += d * q[k];
          item[k] = d * h[k] * p[k];
        }
      }
      for (Index k = 0; k < f; k++) {
        weight[k] += user[k] * p[k];
        user[k] *= h[k];
      }
    }
  }

  void tower_gradients(Index b0, Index b1, const std::vector<float *> &x, const float *slope, float *const *spare,
                       float *g, float *catalogue_gradient) const {
    const Index m = (b1 - b0) * items, width = weights.back().ldo, hidden = weights[0].ldo;
    const auto place = [&](size_t l) { return l || catalogue ? spare[l % 2] : item_gradient + b0 * items * hidden; };
    float *d = place(x.size() - 1);
    for (Index e = 0; e < m; e++)
      for (Index k = 0; k < width; k += kLanes) {
        const Lanes unit = lanes(x.back() + e * width + k);
        lanes(g + output_at + k) += slope[e] * unit;
        lanes(d + e * width + k) = where_on(unit, slope[e] * lanes(output.data() + k));
      }
    for (size_t l = x.size() - 1; l > 0; l--) {
      const Weights &layer = weights[l + 1];
      float *const below = place(l - 1);
      layer.add_gradients(d, x[l - 1], m, g);
      layer.times_transposed(d, m, below);
      for (Index k = 0; k < m * layer.ldi; k += kLanes) {
        Lanes &slopes = lanes(below + k);
        slopes = where_on(lanes(x[l - 1] + k), slopes);
      }
      d = below;
    }
    for (Index b = b0; b < b1; b++) {
      float *const user = sides[0].gradient + b * hidden;
      std::fill_n(user, hidden, 0.f);
      add_rows(d + (b - b0) * items * hidden, hidden, items, user);
    }
    if (!catalogue) return;
    const Index *item = s.item + b0 * items;
    for (Index e = 0; e < m; e++) {
      fetch(catalogue_gradient + item[std::min(e + kAhead, m - 1)] * hidden, hidden);
      add(catalogue_gradient + item[e] * hidden, d + e * hidden, hidden);
    }
  }

  void hand_out(const float *g) const {
    for (Index l = 0; l < s.layers; l++) {
      float *const weight = gradient_of(s.layer[l].weight), *const bias = gradient_of(s.layer[l].bias);
      if (l == 0) {
        const Index user = s.deep_user.dim, stride = user + s.deep_item.dim;
        weights[0].hand_out(g, weight, stride, bias);
        weights[1].hand_out(g, weight + user, stride, nullptr);
      } else {
        weights[l + 1].hand_out(g, weight, weights[l + 1].in, bias);
      }
    }
    if (deep) std::copy_n(g + output_at, weights.back().out, gradient_of(s.output_weight));
    if (s.factors) std::copy_n(g + gmf_at, s.factors, gradient_of(s.gmf_weight));
    *gradient_of(s.bias) = g[bias_at];
  }
};

bool outside(const Index *index, Index n, Index count) {
  return std::any_of(index, index + n, [count](Index row) { return row < 0 || row >= count; });
}

}  // namespace

extern "C" {

enum { kDone, kNoMemory, kOutside };  // kOutside: an index outside its table

int neumf_step(const Step *step, double *loss) {
  const Side &user = step->layers ? step->deep_user : step->gmf_user;
  const Side &item = step->layers ? step->deep_item : step->gmf_item;
  if (outside(step->user, step->rows, user.count)) return kOutside;
  if (outside(step->item, step->rows * step->items, item.count)) return kOutside;
  try {
    *loss = OneStep(*step).run();
  } catch (const std::bad_alloc &) {
    return kNoMemory;
  }
  return kDone;
}

}  // extern "C"
