//! A block of 32 x 32 results: two by two tiles of the processor, or vectors of 16 lanes.

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::LazyLock;

use super::{Columns, Engine, UNIT};

/// Numbers of a line of the frozen factor, two to a column.
type Line = [u32; 16];

/// Whether there are AMX tiles of bfloat16, and the system lets this process use them.
pub(super) fn has_amx() -> bool {
    static FOUND: LazyLock<bool> = LazyLock::new(|| {
        /// Bits of EDX for AMX-BF16 and AMX-TILE.
        const WANTED: u32 = 1 << 22 | 1 << 24;
        __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & WANTED == WANTED && permitted()
    });
    *FOUND
}

/// Asks for the state of the tiles, once for all threads.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    /// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`
    const ARCH_PRCTL: i64 = 158;
    const REQUEST: u64 = 0x1023;
    const TILE_DATA: u64 = 18;
    let result: i64;
    // SAFETY: the call changes nothing but what this process may use; the kernel's own clobbers are named.
    unsafe {
        asm!("syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") REQUEST, in("rsi") TILE_DATA, out("rcx") _, out("r11") _, options(nostack));
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Whether there are vectors of 512 bits with products of bfloat16.
pub(super) fn has_avx512() -> bool {
    std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("avx512bf16")
}

/// A thread's access to the instructions.
pub(super) struct Multiplier(Engine);

impl Multiplier {
    pub(super) fn new(engine: Engine) -> Self {
        if engine == Engine::Amx {
            /// Shapes of the tiles: 16 rows of 64 bytes each.
            #[repr(C, align(64))]
            struct Shapes {
                palette: u8,
                start: u8,
                reserved: [u8; 14],
                row_bytes: [u16; 16],
                rows: [u8; 16],
            }
            let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
            row_bytes[..8].fill(64);
            rows[..8].fill(16);
            let shapes = Shapes { palette: 1, start: 0, reserved: [0; 14], row_bytes, rows };
            // SAFETY: the processor has tiles, and the shapes are valid ones.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly)) };
        }
        Self(engine)
    }

    /// Adds to a block of `target` at a place, or replaces it, the product of rows of `height` numbers and two panels of lines.
    ///
    /// # Safety
    /// `size` results must lie in `target` from `place` on, and nobody else touch them.
    pub(super) unsafe fn block(
        &self,
        (x, height, lines): (&[u16], usize, &[Line]),
        target: Columns,
        place: (usize, usize),
        size: (usize, usize),
        add: bool,
    ) {
        assert!(x.len() >= UNIT * height && lines.len() >= height, "a block that is all there");
        let whole = size == (UNIT, UNIT);
        let mut room = [0.0; UNIT * UNIT];
        // SAFETY: by the caller's word.
        let first = unsafe { target.at(place.0, place.1) };
        let (out, width) = if whole { (first, target.stride) } else { (room.as_mut_ptr(), UNIT) };
        let factors = (x.as_ptr(), lines.as_ptr(), height);
        let add_here = add && whole;
        // SAFETY: both factors were found long enough, the results have their place, and the engine was chosen by what the processor has.
        unsafe {
            match self.0 {
                Engine::Amx => amx(factors, out, width, add_here),
                Engine::Avx512 => avx512(factors, out, width, add_here),
                #[cfg(test)]
                Engine::Blocks => plain(factors, out, width, add_here),
                Engine::Widened | Engine::FewRows => unreachable!("have no order"),
            }
        }
        if !whole {
            for (r, room) in room.chunks_exact(UNIT).enumerate().take(size.0) {
                for (c, value) in room.iter().enumerate().take(size.1) {
                    // SAFETY: inside of `size`.
                    unsafe {
                        let out = first.add(r * target.stride + c);
                        *out = if add { *out + value } else { *value };
                    }
                }
            }
        }
    }
}

impl Drop for Multiplier {
    fn drop(&mut self) {
        if self.0 == Engine::Amx {
            // SAFETY: the tiles were configured by this thread, and nothing is in them.
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
        }
    }
}

/// Rows, lines, and the numbers of a row.
type Factors = (*const u16, *const Line, usize);

/// Four tiles of results, two of rows, two of lines.
unsafe fn amx((x, lines, height): Factors, out: *mut f32, width: usize, add: bool) {
    // SAFETY: 32 rows of `x` and `out`, and two panels of lines are there; tiles are 16 rows of 64 bytes.
    unsafe {
        let (lower, right) = (out.add(16 * width), out.add(16));
        let corner = lower.add(16);
        if add {
            asm!(
                "tileloadd tmm0, [{a} + {s}*1]", "tileloadd tmm1, [{b} + {s}*1]",
                "tileloadd tmm2, [{c} + {s}*1]", "tileloadd tmm3, [{d} + {s}*1]",
                a = in(reg) out, b = in(reg) right, c = in(reg) lower, d = in(reg) corner, s = in(reg) 4 * width,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, options(nostack, readonly),
            );
        } else {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, options(nostack, nomem),
            );
        }
        asm!(
            "2:",
            "tileloadd tmm4, [{x0} + {xs}*1]",
            "tileloadd tmm6, [{w0} + {ws}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w1} + {ws}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{x1} + {xs}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {x0}, 64", "add {x1}, 64", "add {w0}, 1024", "add {w1}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{a} + {s}*1], tmm0", "tilestored [{b} + {s}*1], tmm1",
            "tilestored [{c} + {s}*1], tmm2", "tilestored [{d} + {s}*1], tmm3",
            x0 = inout(reg) x => _, x1 = inout(reg) x.add(16 * height) => _, xs = in(reg) 2 * height,
            w0 = inout(reg) lines => _, w1 = inout(reg) lines.add(height / 2) => _, ws = in(reg) 64_usize,
            steps = inout(reg) height / UNIT => _,
            a = in(reg) out, b = in(reg) right, c = in(reg) lower, d = in(reg) corner, s = in(reg) 4 * width,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Eight rows of two vectors at a time.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn avx512((x, lines, height): Factors, out: *mut f32, width: usize, add: bool) {
    const ROWS: usize = 8;
    // SAFETY: a vector of either has 64 bytes, of which any are valid.
    let pairs = |vector: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(vector) };
    for top in (0..UNIT).step_by(ROWS) {
        // SAFETY: 32 rows of `x` and `out`, and two panels of lines are there.
        unsafe {
            let place = |row: usize, half: usize| out.add((top + row) * width + 16 * half);
            let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
            if add {
                for (row, sums) in sums.iter_mut().enumerate() {
                    *sums = [_mm512_loadu_ps(place(row, 0)), _mm512_loadu_ps(place(row, 1))];
                }
            }
            for pair in 0..height / 2 {
                let line = |half: usize| pairs(_mm512_loadu_si512(lines.add(half * height / 2 + pair).cast()));
                let w = [line(0), line(1)];
                for (row, sums) in sums.iter_mut().enumerate() {
                    let two = x.add((top + row) * height + 2 * pair).cast::<i32>().read_unaligned();
                    let x = pairs(_mm512_set1_epi32(two));
                    *sums = [_mm512_dpbf16_ps(sums[0], x, w[0]), _mm512_dpbf16_ps(sums[1], x, w[1])];
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                _mm512_storeu_ps(place(row, 0), sums[0]);
                _mm512_storeu_ps(place(row, 1), sums[1]);
            }
        }
    }
}

/// What the instructions compute.
#[cfg(test)]
unsafe fn plain((x, lines, height): Factors, out: *mut f32, width: usize, add: bool) {
    let wide = |bits: u32| f32::from_bits(bits << 16);
    for (r, c) in (0..UNIT).flat_map(|r| (0..UNIT).map(move |c| (r, c))) {
        // SAFETY: 32 rows of `x` and `out`, and two panels of lines are there.
        unsafe {
            let out = out.add(r * width + c);
            let product = |k: usize| {
                let two = (*lines.add(c / 16 * height / 2 + k / 2))[c % 16];
                wide(u32::from(*x.add(r * height + k))) * wide(two >> (16 * (k % 2)) & 0xffff)
            };
            *out = (0..height).map(product).sum::<f32>() + if add { *out } else { 0.0 };
        }
    }
}
