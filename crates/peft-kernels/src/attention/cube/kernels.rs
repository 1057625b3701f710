//! A thread owns a query, or in the gradient of keys and values a key; a group of threads brings what they all look at into its shared memory, a tile at a
//! time. Nothing is as large as the scores.
//!
//! The rows of a head of keys are its queries token by token, with the heads that share it side by side: so the threads of a group end at the same key.

use burn::cubecl;
use burn_cubecl::cubecl::prelude::*;

use crate::cube::UNITS;

/// A score that is not there: lower than any that is.
const NONE: f32 = f32::MIN;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Kind {
    pub(super) head_dim: usize,
    /// Keys or queries of a tile.
    pub(super) tile: usize,
    pub(super) causal: bool,
    pub(super) window: bool,
    pub(super) segmented: bool,
}

/// The numbers of one attention; `window` counts only where the kernel was compiled for one.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
pub(super) struct Sizes {
    seq: u32,
    total: u32,
    heads: u32,
    kv_heads: u32,
    window: u32,
    prefix: u32,
}

/// The head of keys that a group of threads works on.
#[derive(CubeType, Clone, Copy)]
struct Head {
    batch: usize,
    kv_head: usize,
    /// Query heads that share it.
    group: usize,
    /// Queries of all of them.
    rows: usize,
    /// The first row or key of this group of threads.
    begin: usize,
}

#[cube]
impl Head {
    fn here(sizes: &Sizes) -> Head {
        let (head, kv_heads) = (CUBE_POS_Y as usize, sizes.kv_heads as usize);
        let group = (sizes.heads / sizes.kv_heads) as usize;
        Head {
            batch: head / kv_heads,
            kv_head: head % kv_heads,
            group,
            rows: sizes.seq as usize * group,
            begin: CUBE_POS_X as usize * comptime!(UNITS),
        }
    }

    /// The place of row `at` in `[batch, seq, heads, head_dim]`.
    fn query(&self, at: usize, sizes: &Sizes, #[comptime] kind: Kind) -> usize {
        let token = self.batch * sizes.seq as usize + at / self.group;
        (token * sizes.heads as usize + self.kv_head * self.group + at % self.group) * comptime!(kind.head_dim)
    }

    /// The place of a key in `[batch, total, kv_heads, head_dim]`.
    fn key(&self, key: usize, sizes: &Sizes, #[comptime] kind: Kind) -> usize {
        let token = self.batch * sizes.total as usize + key;
        (token * sizes.kv_heads as usize + self.kv_head) * comptime!(kind.head_dim)
    }

    /// The place of the sums of row `at` in `[batch, kv_heads, group · seq]`.
    fn stat(&self, at: usize) -> usize {
        CUBE_POS_Y as usize * self.rows + at
    }

    /// Whether row `at` sees a key.
    fn sees(&self, at: usize, key: usize, segments: &Tensor<i32>, sizes: &Sizes, #[comptime] kind: Kind) -> bool {
        let (past, token) = ((sizes.total - sizes.seq) as usize, at / self.group);
        let mut seen = at < self.rows && key < sizes.total as usize;
        if comptime!(kind.causal) {
            seen = seen && (key <= past + token || key < sizes.prefix as usize);
        }
        if comptime!(kind.window) {
            seen = seen && (past + token < key + sizes.window as usize || key < sizes.prefix as usize);
        }
        if comptime!(kind.segmented) {
            let start = self.batch * sizes.seq as usize;
            if seen && key >= past {
                seen = segments[start + key - past] == segments[start + token];
            }
        }
        seen
    }

    /// Whether any row from `first` to `last` may see any key from `from` to `to`, sequences apart.
    fn meet(&self, first: usize, last: usize, from: usize, to: usize, sizes: &Sizes, #[comptime] kind: Kind) -> bool {
        let past = (sizes.total - sizes.seq) as usize;
        let mut near = true;
        if comptime!(kind.causal) {
            near = from <= past + last / self.group;
        }
        if comptime!(kind.window) {
            near = near && past + first / self.group < to + sizes.window as usize;
        }
        near || from < sizes.prefix as usize
    }
}

/// The values of a thread's own query or key; zeros for a thread that has none.
#[cube]
fn own(x: &Tensor<f32>, place: usize, valid: bool, #[comptime] kind: Kind) -> Array<f32> {
    let mut values = Array::<f32>::new(comptime!(kind.head_dim));
    for i in 0..comptime!(kind.head_dim) {
        values[i] = 0.0f32;
        if valid {
            values[i] = x[place + i];
        }
    }
    values
}

/// Writes a thread's own values.
#[cube]
fn put(values: &Array<f32>, x: &mut Tensor<f32>, place: usize, factor: f32, #[comptime] kind: Kind) {
    for i in 0..comptime!(kind.head_dim) {
        x[place + i] = values[i] * factor;
    }
}

#[cube]
fn dot(left: &Array<f32>, right: &Shared<[f32]>, at: usize, #[comptime] kind: Kind) -> f32 {
    let mut sum = 0.0f32;
    for i in 0..comptime!(kind.head_dim) {
        sum += left[i] * right[at * comptime!(kind.head_dim) + i];
    }
    sum
}

/// Adds a multiple of entry `at` of a tile.
#[cube]
fn add(sum: &mut Array<f32>, factor: f32, tile: &Shared<[f32]>, at: usize, #[comptime] kind: Kind) {
    for i in 0..comptime!(kind.head_dim) {
        sum[i] += factor * tile[at * comptime!(kind.head_dim) + i];
    }
}

/// Brings the keys from `start` on, and their values, into shared memory.
#[cube]
fn load_keys(
    k: &Tensor<f32>,
    v: &Tensor<f32>,
    keys: &mut Shared<[f32]>,
    values: &mut Shared<[f32]>,
    head: &Head,
    start: usize,
    sizes: &Sizes,
    #[comptime] kind: Kind,
) {
    let mut i = UNIT_POS_X as usize;
    while i < comptime!(kind.tile * kind.head_dim) {
        let key = start + i / comptime!(kind.head_dim);
        if key < sizes.total as usize {
            let place = head.key(key, sizes, kind) + i % comptime!(kind.head_dim);
            keys[i] = k[place];
            values[i] = v[place];
        }
        i += comptime!(UNITS);
    }
    sync_cube();
}

/// `o`, and `L` by rows.
#[cube(launch)]
pub(super) fn forward_kernel(
    q: &Tensor<f32>,
    k: &Tensor<f32>,
    v: &Tensor<f32>,
    segments: &Tensor<i32>,
    o: &mut Tensor<f32>,
    log_sums: &mut Tensor<f32>,
    sizes: &Sizes,
    scale: f32,
    #[comptime] kind: Kind,
) {
    let head = Head::here(sizes);
    let at = head.begin + UNIT_POS_X as usize;
    let place = head.query(at, sizes, kind);
    let query = own(q, place, at < head.rows, kind);
    let mut sum = own(q, place, false, kind);
    let mut highest = NONE.runtime();
    let mut total = 0.0f32;
    let mut keys = Shared::<[f32]>::new_slice(comptime!(kind.tile * kind.head_dim));
    let mut values = Shared::<[f32]>::new_slice(comptime!(kind.tile * kind.head_dim));
    let mut scores = Array::<f32>::new(comptime!(kind.tile));
    let mut start = 0usize;
    while start < sizes.total as usize {
        let (last, to) = (head.begin + comptime!(UNITS - 1), start + comptime!(kind.tile - 1));
        if head.meet(head.begin, last, start, to, sizes, kind) {
            load_keys(k, v, &mut keys, &mut values, &head, start, sizes, kind);
            let before = highest;
            for j in 0..comptime!(kind.tile) {
                scores[j] = NONE;
                if head.sees(at, start + j, segments, sizes, kind) {
                    scores[j] = scale * dot(&query, &keys, j, kind);
                    highest = max(highest, scores[j]);
                }
            }
            // What was added up so far was for the highest score so far.
            let fade = (before - highest).exp();
            total *= fade;
            for i in 0..comptime!(kind.head_dim) {
                sum[i] *= fade;
            }
            for j in 0..comptime!(kind.tile) {
                if scores[j] > NONE {
                    let p = (scores[j] - highest).exp();
                    total += p;
                    add(&mut sum, p, &values, j, kind);
                }
            }
            sync_cube();
        }
        start += comptime!(kind.tile);
    }
    if at < head.rows {
        put(&sum, o, place, 1.0f32 / total, kind);
        log_sums[head.stat(at)] = total.ln() + highest;
    }
}

/// `dq`; `stats` are `L`, then `Σ do·o`, both by rows.
#[cube(launch)]
pub(super) fn query_kernel(
    grad: &Tensor<f32>,
    q: &Tensor<f32>,
    k: &Tensor<f32>,
    v: &Tensor<f32>,
    stats: &Tensor<f32>,
    segments: &Tensor<i32>,
    q_grad: &mut Tensor<f32>,
    sizes: &Sizes,
    scale: f32,
    #[comptime] kind: Kind,
) {
    let head = Head::here(sizes);
    let at = head.begin + UNIT_POS_X as usize;
    let place = head.query(at, sizes, kind);
    let query = own(q, place, at < head.rows, kind);
    let output_grad = own(grad, place, at < head.rows, kind);
    let mut log_sum = 0.0f32;
    let mut along = 0.0f32;
    if at < head.rows {
        log_sum = stats[head.stat(at)];
        along = stats[stats.len() / 2 + head.stat(at)];
    }
    let mut sum = own(q, place, false, kind);
    let mut keys = Shared::<[f32]>::new_slice(comptime!(kind.tile * kind.head_dim));
    let mut values = Shared::<[f32]>::new_slice(comptime!(kind.tile * kind.head_dim));
    let mut start = 0usize;
    while start < sizes.total as usize {
        let (last, to) = (head.begin + comptime!(UNITS - 1), start + comptime!(kind.tile - 1));
        if head.meet(head.begin, last, start, to, sizes, kind) {
            load_keys(k, v, &mut keys, &mut values, &head, start, sizes, kind);
            for j in 0..comptime!(kind.tile) {
                if head.sees(at, start + j, segments, sizes, kind) {
                    let p = (scale * dot(&query, &keys, j, kind) - log_sum).exp();
                    let score_grad = scale * p * (dot(&output_grad, &values, j, kind) - along);
                    add(&mut sum, score_grad, &keys, j, kind);
                }
            }
            sync_cube();
        }
        start += comptime!(kind.tile);
    }
    if at < head.rows {
        put(&sum, q_grad, place, 1.0f32, kind);
    }
}

/// `dk`, then `dv`: one tensor, since a device may allow a kernel no more than eight.
#[cube(launch)]
pub(super) fn key_kernel(
    grad: &Tensor<f32>,
    q: &Tensor<f32>,
    k: &Tensor<f32>,
    v: &Tensor<f32>,
    stats: &Tensor<f32>,
    segments: &Tensor<i32>,
    grads: &mut Tensor<f32>,
    sizes: &Sizes,
    scale: f32,
    #[comptime] kind: Kind,
) {
    let head = Head::here(sizes);
    let key = head.begin + UNIT_POS_X as usize;
    let (place, valid) = (head.key(key, sizes, kind), key < sizes.total as usize);
    let (own_key, own_value) = (own(k, place, valid, kind), own(v, place, valid, kind));
    let (mut key_sum, mut value_sum) = (own(k, place, false, kind), own(v, place, false, kind));
    let mut queries = Shared::<[f32]>::new_slice(comptime!(kind.tile * kind.head_dim));
    let mut output_grads = Shared::<[f32]>::new_slice(comptime!(kind.tile * kind.head_dim));
    let mut start = 0usize;
    while start < head.rows {
        let (last, to) = (start + comptime!(kind.tile - 1), head.begin + comptime!(UNITS - 1));
        if head.meet(start, last, head.begin, to, sizes, kind) {
            let mut i = UNIT_POS_X as usize;
            while i < comptime!(kind.tile * kind.head_dim) {
                let row = start + i / comptime!(kind.head_dim);
                if row < head.rows {
                    let from = head.query(row, sizes, kind) + i % comptime!(kind.head_dim);
                    queries[i] = q[from];
                    output_grads[i] = grad[from];
                }
                i += comptime!(UNITS);
            }
            sync_cube();
            for j in 0..comptime!(kind.tile) {
                let row = start + j;
                if head.sees(row, key, segments, sizes, kind) {
                    let p = (scale * dot(&own_key, &queries, j, kind) - stats[head.stat(row)]).exp();
                    let along = stats[stats.len() / 2 + head.stat(row)];
                    let score_grad = scale * p * (dot(&own_value, &output_grads, j, kind) - along);
                    add(&mut key_sum, score_grad, &queries, j, kind);
                    add(&mut value_sum, p, &output_grads, j, kind);
                }
            }
            sync_cube();
        }
        start += comptime!(kind.tile);
    }
    if valid {
        put(&key_sum, grads, place, 1.0f32, kind);
        let behind = grads.len() / 2 + place;
        put(&value_sum, grads, behind, 1.0f32, kind);
    }
}
