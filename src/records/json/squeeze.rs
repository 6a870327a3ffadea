//! Step 3, squeeze: moves the bytes of a checked chunk that stay to the end of what was kept before.
//!
//! Last of the three steps; what it overwrites has been checked and will not be read again. Never allocates.
//!
//! ```text
//!  body  ┌───────────────────────────┬─────────────┬───────────┬──────────┬─────────────────┐
//!        │ compacted                 │ stale       │ squeezed  │ chunk    │ not yet read    │
//!        └───────────────────────────┴─────────────┴───────────┴──────────┴─────────────────┘
//!                                    ^ kept_size               ^ offset                     ^ body.len()
//!                                    [ 64 bytes )   ≤          [ 64 bytes )
//! ```
//!
//! Invariant: `kept_size ≤ offset`, so storing a whole block at `kept_size` ends at or before the end of the block that
//! was just loaded. The last block of a body may be a partial one: it goes through a block on the stack, and nothing
//! is ever written past the end of the body, where the next request may be waiting.
//!
//! Not here: any decision about what stays.

use super::block::{BLOCK_SIZE, Block};
use super::classify::Chunk;
use super::grammar::Marks;
use crate::records::RecordStarts;

/// Moves what stays of `body[from..to]` to `body[kept_size..]`; returns the new kept size.
#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "the pieces of one scratch, borrowed apart"
)]
pub(super) fn squeeze<B: Block>(
    block: B,
    body: &mut [u8],
    from: usize,
    to: usize,
    kept_size: usize,
    chunk: &Chunk,
    marks: &Marks,
    starts: &mut RecordStarts,
) -> usize {
    if marks.any {
        run::<B, true>(block, body, from, to, kept_size, chunk, marks, starts)
    } else if kept_size == from && keeps_all(chunk, (to - from).div_ceil(BLOCK_SIZE)) {
        to
    } else {
        run::<B, false>(block, body, from, to, kept_size, chunk, marks, starts)
    }
}

/// Whether no byte of the first blocks is dropped.
fn keeps_all(chunk: &Chunk, block_count: usize) -> bool {
    chunk.keeps[..block_count].iter().all(|&keep| keep == !0)
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "as above")]
fn run<B: Block, const MARKED: bool>(
    block: B,
    body: &mut [u8],
    from: usize,
    to: usize,
    mut kept_size: usize,
    chunk: &Chunk,
    marks: &Marks,
    starts: &mut RecordStarts,
) -> usize {
    assert!(kept_size <= from, "the compacted part overtook the chunk");
    let block_count = (to - from) / BLOCK_SIZE;
    let mut token_index = 0;
    for index in 0..block_count {
        let mut keep = chunk.keeps[index];
        if MARKED {
            keep = mark(
                block,
                index,
                &mut token_index,
                kept_size,
                chunk,
                marks,
                starts,
            );
        }
        let offset = from + index * BLOCK_SIZE;
        let Some(bytes) = body[offset..].first_chunk() else {
            break;
        };
        let lanes = block.load(bytes);
        let Some(window) = body[kept_size..].first_chunk_mut() else {
            break;
        };
        block.squeeze(lanes, keep, window);
        kept_size += keep.count_ones() as usize;
    }
    let offset = from + block_count * BLOCK_SIZE;
    if offset < to {
        // Beyond the body the padding is white space: dropped, as a string that is still open was refused.
        let mut keep = chunk.keeps[block_count];
        if MARKED {
            keep = mark(
                block,
                block_count,
                &mut token_index,
                kept_size,
                chunk,
                marks,
                starts,
            );
        }
        let mut bytes = [b' '; BLOCK_SIZE];
        bytes[..to - offset].copy_from_slice(&body[offset..to]);
        let mut squeezed = [0; BLOCK_SIZE];
        block.squeeze(block.load(&bytes), keep, &mut squeezed);
        let size = keep.count_ones() as usize;
        body[kept_size..kept_size + size].copy_from_slice(&squeezed[..size]);
        kept_size += size;
    }
    kept_size
}

/// Marks the starts in block `index`, whose bytes go to `kept_size`; returns which of them stay.
// A function, because a closure that is not inlined is compiled without the instructions of `B`.
#[inline(always)]
fn mark<B: Block>(
    block: B,
    index: usize,
    token_index: &mut usize,
    kept_size: usize,
    chunk: &Chunk,
    marks: &Marks,
    starts: &mut RecordStarts,
) -> u64 {
    // The marks of this block's tokens, moved from their numbers to their bytes.
    let tokens = chunk.token_masks[index];
    let drop = block.bits_scatter(bits_at(&marks.drops, *token_index), tokens);
    let start = block.bits_scatter(bits_at(&marks.starts, *token_index), tokens);
    let keep = chunk.keeps[index] & !drop;
    // Marked even when there is no start: a store is cheaper than a branch nobody can predict.
    starts.mark(kept_size, block.bits_gather(start, keep));
    *token_index += tokens.count_ones() as usize;
    keep
}

/// 64 bits from bit `index` on.
#[inline(always)]
fn bits_at(words: &[u64], index: usize) -> u64 {
    let (word, shift) = (index / 64, index % 64);
    words[word] >> shift | words[word + 1] << 1 << (63 - shift)
}
