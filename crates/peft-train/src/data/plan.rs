//! Which samples meet in which batch.

use std::collections::BTreeMap;

use super::shuffle::Shuffler;

/// The batches of an epoch; a batch is a list of rows, a row a list of samples by number (one, unless packed).
pub(super) type Plan = Vec<Vec<Vec<usize>>>;

/// Samples in windows of this many batches are sorted by length: enough to need little padding, few enough to stay random.
const WINDOW: usize = 50;

/// Batches of samples of similar length, in random order.
pub(super) fn bucketed(lengths: &[usize], batch_size: usize, shuffler: &mut Shuffler) -> Plan {
    let mut order = shuffler.permutation(lengths.len());
    for window in order.chunks_mut(WINDOW.saturating_mul(batch_size)) {
        window.sort_by_key(|&sample| lengths[sample]);
    }
    // A window is a whole number of batches, so only the last batch may be short.
    let rows: Vec<Vec<usize>> = order.into_iter().map(|sample| vec![sample]).collect();
    let mut batches = batched(&rows, batch_size);
    shuffler.shuffle(&mut batches);
    batches
}

/// Batches of rows of several samples, by best fit in order of falling length. How many rows that takes depends on the
/// lengths alone, so each epoch has the same number of batches.
pub(super) fn packed(lengths: &[usize], batch_size: usize, capacity: usize, shuffler: &mut Shuffler) -> Plan {
    let mut order = shuffler.permutation(lengths.len());
    order.sort_by_key(|&sample| std::cmp::Reverse(lengths[sample]));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    let mut by_room: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for sample in order {
        let length = lengths[sample];
        let fit = by_room.range(length..).next().map(|(&room, _)| room);
        let found = fit.and_then(|room| {
            let row = by_room.get_mut(&room)?.pop();
            if by_room.get(&room).is_some_and(Vec::is_empty) {
                by_room.remove(&room);
            }
            Some((row?, room))
        });
        let (row, room) = found.unwrap_or_else(|| {
            rows.push(Vec::new());
            (rows.len() - 1, capacity)
        });
        rows[row].push(sample);
        by_room.entry(room.saturating_sub(length)).or_default().push(row);
    }
    shuffler.shuffle(&mut rows);
    batched(&rows, batch_size)
}

fn batched(rows: &[Vec<usize>], batch_size: usize) -> Plan {
    rows.chunks(batch_size).map(<[_]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(count: usize, seed: u64) -> Vec<usize> {
        Shuffler::new(seed, 9).permutation(count).into_iter().map(|i| 2 + i * i % 61).collect()
    }

    fn flat(plan: &Plan) -> Vec<usize> {
        plan.iter().flatten().flatten().copied().collect()
    }

    #[test]
    fn every_sample_occurs_exactly_once_in_every_epoch() {
        for seed in 0..20 {
            for count in [1, 2, 7, 64, 333] {
                let lengths = lengths(count, seed);
                for batch_size in [1, 3, 8] {
                    let mut sizes = Vec::new();
                    for epoch in 0..3 {
                        let plan = bucketed(&lengths, batch_size, &mut Shuffler::new(seed, epoch));
                        let pack = packed(&lengths, batch_size, 64, &mut Shuffler::new(seed, epoch));
                        for plan in [&plan, &pack] {
                            let mut all = flat(plan);
                            all.sort_unstable();
                            assert_eq!(all, (0..count).collect::<Vec<_>>());
                            assert!(plan.iter().all(|batch| (1..=batch_size).contains(&batch.len())));
                        }
                        for row in pack.iter().flatten() {
                            assert!(row.iter().map(|&sample| lengths[sample]).sum::<usize>() <= 64);
                        }
                        assert_eq!(plan.len(), count.div_ceil(batch_size));
                        sizes.push(pack.len());
                    }
                    assert!(sizes.windows(2).all(|pair| pair[0] == pair[1]), "packed epochs have equal length");
                }
            }
        }
    }

    #[test]
    fn epochs_differ_and_repeat() {
        let lengths = lengths(100, 1);
        let epoch = |epoch| flat(&bucketed(&lengths, 4, &mut Shuffler::new(5, epoch)));
        assert_eq!(epoch(0), epoch(0));
        assert_ne!(epoch(0), epoch(1));
    }

    #[test]
    fn buckets_save_padding_and_packs_are_full() {
        let lengths = lengths(1000, 3);
        let tokens: usize = lengths.iter().sum();
        let padded = |plan: &Plan| -> usize {
            let row = |row: &Vec<usize>| row.iter().map(|&sample| lengths[sample]).sum::<usize>();
            plan.iter().map(|batch| batch.len() * batch.iter().map(row).max().unwrap_or(0)).sum()
        };
        let bucketed = padded(&bucketed(&lengths, 8, &mut Shuffler::new(1, 0)));
        let packed = padded(&packed(&lengths, 8, 256, &mut Shuffler::new(1, 0)));
        assert!(bucketed < tokens * 21 / 20, "{bucketed} for {tokens} tokens");
        assert!(packed < tokens * 103 / 100, "{packed} for {tokens} tokens");
    }
}
