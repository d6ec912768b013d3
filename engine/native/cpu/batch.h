// What a run of a session is asked for, and what of it can be checked before anything runs. The same for every backend.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "failure.h"

namespace halo {

// Of each row: the noise, the winner, and what is near. See halo_session_draw.
struct Draw {
  const float *noise;
  float depth;
  size_t room;
  int32_t *winners, *found, *ids;
  float *logits;
};

// The arrays are the caller's. Results of each wanted entry: all logits, or the arg max, or what `draw` has.
struct Batch {
  int n;
  const int32_t *tokens, *slots, *positions;
  const uint8_t *want;
  float *logits;
  size_t logits_count;
  int32_t *ids;
  size_t ids_count;
  const Draw *draw;
  size_t draw_count;  // wanted entries that its arrays have room for
};

// Throws Failure for an entry that cannot be. lengths: the tokens that each slot holds.
inline void check_batch(const Batch &batch, const halo_config &config, int slot_count, int context,
                        std::vector<int32_t> lengths) {
  size_t wanted = 0;
  for (int i = 0; i < batch.n; ++i) {
    int token = batch.tokens[i], slot = batch.slots[i], position = batch.positions[i];
    if (token < 0 || token >= config.vocab_size)
      throw Failure(HALO_INVALID, "entry %d: token %d is outside the vocabulary of %d", i, token, config.vocab_size);
    if (slot < 0 || slot >= slot_count)
      throw Failure(HALO_INVALID, "entry %d: slot %d is outside the session's %d slots", i, slot, slot_count);
    if (position < 0 || position >= context)
      throw Failure(HALO_INVALID, "entry %d: position %d is outside the context of %d tokens", i, position, context);
    if (position > lengths[slot])
      throw Failure(HALO_INVALID, "entry %d: position %d would leave a gap, slot %d holds %d tokens", i, position, slot,
                    lengths[slot]);
    lengths[slot] = position + 1;
    wanted += batch.want[i] != 0;
  }
  if (batch.logits && wanted > batch.logits_count / (size_t)config.vocab_size)
    throw Failure(HALO_INVALID, "%zu rows of logits do not fit into room for %zu floats", wanted, batch.logits_count);
  if ((batch.ids && wanted > batch.ids_count) || (batch.draw && wanted > batch.draw_count))
    throw Failure(HALO_INVALID, "%zu results do not fit into room for %zu", wanted,
                  batch.draw ? batch.draw_count : batch.ids_count);
}

// Throws Failure unless `to` can take the first `length` tokens of `from`.
inline void check_copy(int from, int to, int length, const std::vector<int32_t> &lengths) {
  const int count = (int)lengths.size();
  if (from < 0 || from >= count || to < 0 || to >= count)
    throw Failure(HALO_INVALID, "slot %d is outside the session's %d slots", from < 0 || from >= count ? from : to, count);
  if (from == to) throw Failure(HALO_INVALID, "slot %d cannot be copied to itself", from);
  if (length < 0 || length > lengths[from])
    throw Failure(HALO_INVALID, "length = %d; slot %d holds %d tokens", length, from, lengths[from]);
}

// Where the chunk ends that begins at `start`: after `most` entries, or where a slot is rewound, since its keys up to there
// are still needed by the tokens before.
inline int chunk_end(const Batch &batch, int start, int most) {
  int end = start;
  for (; end < batch.n && end - start < most; ++end)
    for (int i = start; i < end; ++i)
      if (batch.slots[i] == batch.slots[end] && batch.positions[i] >= batch.positions[end]) return end;
  return end;
}

}  // namespace halo
