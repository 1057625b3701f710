//! The mean of f32 values as PyTorch takes it on the CPU, to the last bit: it becomes the offset that bitsandbytes writes into a file.

/// Values that PyTorch adds at once (its vectors have 8 lanes on every x86 since 2013).
const LANES: usize = 8;

/// Sums that run beside each other, so that one addition need not wait for the other.
const CHAINS: usize = 4;

/// Levels of the cascade that keeps partial sums of similar size.
const LEVELS: usize = 4;

/// Mean of `values`, summed as by PyTorch on one thread; more threads share sums of more than 32768 values.
pub(crate) fn mean(values: &[f32]) -> f32 {
    let (rows, rest) = values.as_chunks::<LANES>();
    let sum = if rows.is_empty() {
        cascade(values.as_chunks::<1>().0)[0]
    } else {
        let rest: f32 = rest.iter().fold(0.0, |sum, value| sum + value);
        cascade(rows).iter().fold(rest, |sum, lane| sum + lane)
    };
    sum / values.len() as f32
}

/// Sums of each lane.
fn cascade<const L: usize>(rows: &[[f32; L]]) -> [f32; L] {
    let (groups, rest) = rows.as_chunks::<CHAINS>();
    let power = (ceil_log2(groups.len()) / LEVELS).max(4);
    let mut levels = [[[0.0; L]; CHAINS]; LEVELS];
    for (done, group) in (1..).zip(groups) {
        add_each(&mut levels[0], group);
        let mut level = 1;
        // A level that is full goes into the next one.
        while level < LEVELS && done % (1_usize << (level * power)) == 0 {
            let full = std::mem::replace(&mut levels[level - 1], [[0.0; L]; CHAINS]);
            add_each(&mut levels[level], &full);
            level += 1;
        }
    }
    let [mut chains, higher @ ..] = levels;
    for level in higher {
        add_each(&mut chains, &level);
    }
    let [mut sum, others @ ..] = chains;
    for row in rest.iter().chain(&others) {
        add(&mut sum, row);
    }
    sum
}

fn add_each<const L: usize>(sums: &mut [[f32; L]; CHAINS], rows: &[[f32; L]; CHAINS]) {
    sums.iter_mut().zip(rows).for_each(|(sum, row)| add(sum, row));
}

fn add<const L: usize>(sum: &mut [f32; L], row: &[f32; L]) {
    sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
}

fn ceil_log2(count: usize) -> usize {
    count.max(1).next_power_of_two().trailing_zeros() as usize
}

#[cfg(test)]
mod tests {
    use super::mean;

    /// Means made by PyTorch 2.15 on one thread, as bits; half of them are not the nearest to the exact mean.
    const MEANS: [(usize, u32); 8] = [
        (1, 0x4000_0000),
        (5, 0x401b_e888),
        (7, 0x401b_3be2),
        (37, 0x401e_762c),
        (320, 0x401f_e413),
        (1000, 0x401f_ff9c),
        (20_000, 0x401f_ff2e),
        (40_000, 0x401f_ffe3),
    ];

    #[test]
    fn means_are_those_of_pytorch() {
        let value = |index: u32| 2.0 + (index.wrapping_mul(2_654_435_761) >> 12) as f32 / 1_048_576.0;
        let values: Vec<f32> = (0..40_000).map(value).collect();
        for (count, expected) in MEANS {
            assert_eq!(mean(&values[..count]).to_bits(), expected, "{count}");
        }
    }
}
