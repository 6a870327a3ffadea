//! Blocks: 64 bytes at a time, in whatever registers this machine has.
//!
//! Everything above this file is written once, against [`Block`]; here are its three implementations and the
//! one place where the choice between them becomes a call ([`Arch::run`]).
//! Never allocates; a value of an implementation's type exists only on a machine that has the instructions
//! (each has private fields and a `detect`), which is what the `unsafe` below leans on.
//!
//! Not here: anything about JSON beyond which bytes are interesting ([`Classes`]).

/// Bytes in a block: as many as a mask has bits.
pub(super) const BLOCK_SIZE: usize = 64;

/// One bit per byte of a block, for each question that every block is asked. A line of the cache, like the block.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
pub(super) struct Classes {
    /// 0x80 and above.
    pub high: u64,
    pub backslash: u64,
    pub quote: u64,
    /// Space, tab, line feed, carriage return.
    pub white: u64,
    /// `{}[]:,`, and also 0x0C and 0x1A: the caller refuses control characters anyway.
    pub op: u64,
    /// Below 0x20.
    pub control: u64,
    pub newline: u64,
    pub digit: u64,
}

const _: () = assert!(size_of::<Classes>() == BLOCK_SIZE);

/// What an instruction set must be able to do with 64 bytes.
pub(super) trait Block: Copy {
    type Lanes: Copy;
    fn load(self, from: &[u8; BLOCK_SIZE]) -> Self::Lanes;
    /// To memory and not returned: one implementation has all masks in one register, and they are read one by one.
    fn classify(self, lanes: Self::Lanes, to: &mut Classes);
    fn equal(self, lanes: Self::Lanes, byte: u8) -> u64;
    /// Writes the bytes whose bit is set to the front of `to`, without gaps; the rest of `to` is left undefined.
    fn squeeze(self, lanes: Self::Lanes, keep: u64, to: &mut [u8; BLOCK_SIZE]);
    /// Bit i of the result is the xor of bits 0..=i.
    fn prefix_xor(self, mask: u64) -> u64;
    /// The bits of `value` at the set bits of `mask`, moved together at the low end (`pext`).
    fn bits_gather(self, value: u64, mask: u64) -> u64;
    /// The low bits of `value`, moved to the set bits of `mask` (`pdep`).
    fn bits_scatter(self, value: u64, mask: u64) -> u64;
}

/// Work that is generic over the instruction set. `run` must be `#[inline(always)]`, or it is compiled without it.
pub(super) trait Job {
    type Output;
    fn run<B: Block>(self, block: B) -> Self::Output;
}

/// An implementation that this machine was found to support.
#[derive(Clone, Copy)]
pub(super) enum Arch {
    #[cfg(target_arch = "x86_64")]
    Avx512(x86::Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::Avx2),
    Portable(Portable),
}

impl Arch {
    /// Runs `job` compiled for this implementation's instructions.
    #[inline]
    pub fn run<J: Job>(self, job: J) -> J::Output {
        match self {
            // SAFETY: an `Avx512` exists only where `detect` found every feature named on `run`.
            #[cfg(target_arch = "x86_64")]
            Arch::Avx512(block) => unsafe { x86::run_avx512(block, job) },
            // SAFETY: as above, for `Avx2`.
            #[cfg(target_arch = "x86_64")]
            Arch::Avx2(block) => unsafe { x86::run_avx2(block, job) },
            Arch::Portable(block) => job.run(block),
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use super::{BLOCK_SIZE, Block, Classes, Job};
    use std::arch::is_x86_feature_detected as has;
    use std::arch::x86_64::*;
    use std::mem::offset_of;

    /// A byte is white space exactly if this table, looked up by its low nibble, gives the byte itself.
    /// The fillers have another low nibble than the one they are looked up with.
    const WHITE: [u8; 16] = [
        b' ', 100, 100, 100, 17, 100, 113, 2, 100, b'\t', b'\n', 112, 100, b'\r', 100, 100,
    ];
    /// The same for a byte | 0x20 and `{}[]:,`: the brackets of a kind differ in that bit only.
    const OP: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, b':', b'{', b',', b'}', 0, 0];

    /// Of each ASCII character, bit i for the member of [`Classes`] after i others, and the first one for the top bit:
    /// that is the bit that is set in what is not ASCII.
    const CLASS_BITS: [u8; 128] = {
        let mut table = [0; 128];
        let mut byte = 0;
        while byte < 128 {
            table[byte] = match byte as u8 {
                b'\\' => 1,
                b'"' => 1 << 1,
                b' ' => 1 << 2,
                b'\t' | b'\r' => 1 << 2 | 1 << 4,
                b'\n' => 1 << 2 | 1 << 4 | 1 << 5,
                b'{' | b'}' | b'[' | b']' | b':' | b',' => 1 << 3,
                0..0x20 => 1 << 4,
                b'0'..=b'9' => 1 << 6,
                _ => 0,
            };
            byte += 1;
        }
        table
    };
    const _: () = {
        assert!(offset_of!(Classes, backslash) == 8 && offset_of!(Classes, quote) == 2 * 8);
        assert!(offset_of!(Classes, white) == 3 * 8 && offset_of!(Classes, op) == 4 * 8);
        assert!(offset_of!(Classes, control) == 5 * 8 && offset_of!(Classes, newline) == 6 * 8);
        assert!(offset_of!(Classes, digit) == 7 * 8 && offset_of!(Classes, high) == 0);
    };
    /// The order in which 8 rows of 8 bytes are 8 columns, the last one first.
    const TRANSPOSED: [u8; BLOCK_SIZE] = {
        let mut order = [0; BLOCK_SIZE];
        let mut index = 0;
        while index < BLOCK_SIZE {
            order[index] = (index % 8 * 8 + (index / 8 + 7) % 8) as u8;
            index += 1;
        }
        order
    };

    /// AVX-512 with byte lanes, byte permutation and compression, and bit matrices (Ice Lake, Zen 4 and later).
    #[derive(Clone, Copy)]
    pub struct Avx512(());

    /// AVX2 with the bit-manipulation instructions (Haswell, Zen and later).
    #[derive(Clone, Copy)]
    pub struct Avx2(());

    fn has_bits() -> bool {
        has!("bmi1") && has!("bmi2") && has!("popcnt") && has!("lzcnt") && has!("pclmulqdq")
    }

    impl Avx512 {
        pub fn detect() -> Option<Self> {
            let found = has!("avx2") && has!("avx512f") && has!("avx512bw") && has!("avx512vbmi");
            let found = found && has!("avx512vbmi2") && has!("gfni");
            (found && has_bits()).then_some(Self(()))
        }
    }

    impl Avx2 {
        pub fn detect() -> Option<Self> {
            (has!("avx2") && has_bits()).then_some(Self(()))
        }
    }

    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vbmi,avx512vbmi2,gfni")]
    #[target_feature(enable = "bmi1,bmi2,popcnt,lzcnt,pclmulqdq")]
    pub fn run_avx512<J: Job>(block: Avx512, job: J) -> J::Output {
        job.run(block)
    }

    #[target_feature(enable = "avx2,bmi1,bmi2,popcnt,lzcnt,pclmulqdq")]
    pub fn run_avx2<J: Job>(block: Avx2, job: J) -> J::Output {
        job.run(block)
    }

    /// # Safety
    /// The machine has PCLMULQDQ and SSE2.
    #[inline(always)]
    unsafe fn prefix_xor_clmul(mask: u64) -> u64 {
        // SAFETY: the caller's contract. A carry-less product with all ones is the prefix xor.
        unsafe {
            let product =
                _mm_clmulepi64_si128(_mm_set_epi64x(0, mask as i64), _mm_set1_epi8(-1), 0);
            _mm_cvtsi128_si64(product) as u64
        }
    }

    impl Block for Avx512 {
        type Lanes = __m512i;

        #[inline(always)]
        fn load(self, from: &[u8; BLOCK_SIZE]) -> __m512i {
            // SAFETY: `self` proves AVX-512; 64 readable bytes, no alignment asked.
            unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
        }

        #[inline(always)]
        fn classify(self, lanes: __m512i, to: &mut Classes) {
            // SAFETY: `self` proves AVX-512 BW, VBMI and GFNI; the tables and `to` are 64 bytes per register.
            unsafe {
                let table = |half: usize| _mm512_loadu_si512(CLASS_BITS.as_ptr().add(half).cast());
                // One bit per class. The table has 128 entries and ignores the top bit, so what is not ASCII becomes
                // 0x7F, which has no class, and gets its own bit back afterwards.
                let ascii = _mm512_min_epu8(lanes, _mm512_set1_epi8(0x7F));
                let bits = _mm512_permutex2var_epi8(table(0), ascii, table(64));
                let top = _mm512_set1_epi8(-128);
                let bits = _mm512_ternarylogic_epi64::<0xF8>(bits, lanes, top); // bits | lanes & top
                // From a byte per byte to a word per class. First each group of 8 bytes is transposed as 8 by 8 bits
                // (the product of the group, as a matrix, with the unit vectors; it counts rows from the last one,
                // so a second product reverses the bits of each byte), then the 8 by 8 bytes of all groups.
                let units = _mm512_set1_epi64(0x8040_2010_0804_0201_u64 as i64);
                let columns = _mm512_gf2p8affine_epi64_epi8::<0>(units, bits);
                let columns = _mm512_gf2p8affine_epi64_epi8::<0>(columns, units);
                let order = _mm512_loadu_si512(TRANSPOSED.as_ptr().cast());
                let words = _mm512_permutexvar_epi8(order, columns);
                _mm512_store_si512(std::ptr::from_mut(to).cast(), words);
            }
        }

        #[inline(always)]
        fn equal(self, lanes: __m512i, byte: u8) -> u64 {
            // SAFETY: `self` proves AVX-512 BW; registers only.
            unsafe { _mm512_cmpeq_epi8_mask(lanes, _mm512_set1_epi8(byte as i8)) }
        }

        #[inline(always)]
        fn squeeze(self, lanes: __m512i, keep: u64, to: &mut [u8; BLOCK_SIZE]) {
            // SAFETY: `self` proves VBMI2; 64 writable bytes. Compressed in a register and stored whole: the
            // form that compresses into memory is microcoded on Zen 4.
            unsafe {
                _mm512_storeu_si512(
                    to.as_mut_ptr().cast(),
                    _mm512_maskz_compress_epi8(keep, lanes),
                )
            }
        }

        #[inline(always)]
        fn prefix_xor(self, mask: u64) -> u64 {
            // SAFETY: `self` proves PCLMULQDQ.
            unsafe { prefix_xor_clmul(mask) }
        }

        #[inline(always)]
        fn bits_gather(self, value: u64, mask: u64) -> u64 {
            // SAFETY: `self` proves BMI2.
            unsafe { _pext_u64(value, mask) }
        }

        #[inline(always)]
        fn bits_scatter(self, value: u64, mask: u64) -> u64 {
            // SAFETY: `self` proves BMI2.
            unsafe { _pdep_u64(value, mask) }
        }
    }

    /// # Safety
    /// The machine has AVX2.
    #[inline(always)]
    unsafe fn mask_avx2(low: __m256i, high: __m256i) -> u64 {
        // SAFETY: the caller's contract; registers only.
        unsafe {
            u64::from(_mm256_movemask_epi8(low) as u32)
                | u64::from(_mm256_movemask_epi8(high) as u32) << 32
        }
    }

    impl Avx2 {
        #[inline(always)]
        fn digits(self, [low, high]: [__m256i; 2]) -> u64 {
            // SAFETY: `self` proves AVX2; registers only.
            unsafe {
                let (zero, nine) = (_mm256_set1_epi8(b'0' as i8), _mm256_set1_epi8(9));
                let (low, high) = (_mm256_sub_epi8(low, zero), _mm256_sub_epi8(high, zero));
                mask_avx2(
                    _mm256_cmpeq_epi8(_mm256_max_epu8(low, nine), nine),
                    _mm256_cmpeq_epi8(_mm256_max_epu8(high, nine), nine),
                )
            }
        }
    }

    impl Block for Avx2 {
        type Lanes = [__m256i; 2];

        #[inline(always)]
        fn load(self, from: &[u8; BLOCK_SIZE]) -> Self::Lanes {
            // SAFETY: `self` proves AVX2; 64 readable bytes, no alignment asked.
            unsafe {
                [
                    _mm256_loadu_si256(from.as_ptr().cast()),
                    _mm256_loadu_si256(from.as_ptr().add(32).cast()),
                ]
            }
        }

        #[inline(always)]
        fn classify(self, [low, high]: Self::Lanes, to: &mut Classes) {
            // SAFETY: `self` proves AVX2; registers only, and the tables are 16 bytes.
            unsafe {
                let white = _mm256_broadcastsi128_si256(_mm_loadu_si128(WHITE.as_ptr().cast()));
                let op = _mm256_broadcastsi128_si256(_mm_loadu_si128(OP.as_ptr().cast()));
                let bit = _mm256_set1_epi8(0x20);
                let below = _mm256_set1_epi8(0x1F);
                *to = Classes {
                    quote: self.equal([low, high], b'"'),
                    backslash: self.equal([low, high], b'\\'),
                    white: mask_avx2(
                        _mm256_cmpeq_epi8(low, _mm256_shuffle_epi8(white, low)),
                        _mm256_cmpeq_epi8(high, _mm256_shuffle_epi8(white, high)),
                    ),
                    op: mask_avx2(
                        _mm256_cmpeq_epi8(_mm256_or_si256(low, bit), _mm256_shuffle_epi8(op, low)),
                        _mm256_cmpeq_epi8(
                            _mm256_or_si256(high, bit),
                            _mm256_shuffle_epi8(op, high),
                        ),
                    ),
                    control: mask_avx2(
                        _mm256_cmpeq_epi8(_mm256_max_epu8(low, below), below),
                        _mm256_cmpeq_epi8(_mm256_max_epu8(high, below), below),
                    ),
                    newline: self.equal([low, high], b'\n'),
                    digit: self.digits([low, high]),
                    high: mask_avx2(low, high),
                };
            }
        }

        #[inline(always)]
        fn equal(self, [low, high]: Self::Lanes, byte: u8) -> u64 {
            // SAFETY: `self` proves AVX2; registers only.
            unsafe {
                let byte = _mm256_set1_epi8(byte as i8);
                mask_avx2(_mm256_cmpeq_epi8(low, byte), _mm256_cmpeq_epi8(high, byte))
            }
        }

        #[inline(always)]
        fn squeeze(self, lanes: Self::Lanes, keep: u64, to: &mut [u8; BLOCK_SIZE]) {
            // SAFETY: `self` proves AVX2; 64 writable bytes.
            let store = |to: &mut [u8; BLOCK_SIZE]| unsafe {
                _mm256_storeu_si256(to.as_mut_ptr().cast(), lanes[0]);
                _mm256_storeu_si256(to.as_mut_ptr().add(32).cast(), lanes[1]);
            };
            if keep == !0 {
                return store(to);
            }
            let mut from = [0; BLOCK_SIZE];
            store(&mut from);
            let (words, _) = from.as_chunks::<8>();
            let (mut rest, mut size) = (keep, 0);
            for word in words {
                // SAFETY: `self` proves BMI2. Each mask bit becomes a byte of ones, and the word keeps those bytes.
                let kept = unsafe {
                    let ones = _pdep_u64(rest, 0x0101_0101_0101_0101).wrapping_mul(0xFF);
                    _pext_u64(u64::from_le_bytes(*word), ones)
                };
                to[size..size + 8].copy_from_slice(&kept.to_le_bytes());
                size += (rest as u8).count_ones() as usize;
                rest >>= 8;
            }
        }

        #[inline(always)]
        fn prefix_xor(self, mask: u64) -> u64 {
            // SAFETY: `self` proves PCLMULQDQ.
            unsafe { prefix_xor_clmul(mask) }
        }

        #[inline(always)]
        fn bits_gather(self, value: u64, mask: u64) -> u64 {
            // SAFETY: `self` proves BMI2.
            unsafe { _pext_u64(value, mask) }
        }

        #[inline(always)]
        fn bits_scatter(self, value: u64, mask: u64) -> u64 {
            // SAFETY: `self` proves BMI2.
            unsafe { _pdep_u64(value, mask) }
        }
    }
}

/// Any machine: eight bytes of a `u64` at a time.
#[derive(Clone, Copy)]
pub(super) struct Portable;

const LOW_BITS: u64 = 0x0101_0101_0101_0101;
const HIGH_BITS: u64 = LOW_BITS << 7;

/// The top bit of each byte that is below `limit` (at most 0x80).
#[inline(always)]
fn below(word: u64, limit: u8) -> u64 {
    // (byte & 0x7F) + (0x80 - limit) reaches 0x80 exactly if the low seven bits are not below; no carry crosses.
    let sum = (word & !HIGH_BITS) + LOW_BITS * u64::from(0x80 - limit);
    !(sum | word) & HIGH_BITS
}

impl Portable {
    /// One mask bit per byte from a function that sets the top bit of the bytes it wants.
    #[inline(always)]
    fn mask(lanes: [u64; 8], wanted: impl Fn(u64) -> u64) -> u64 {
        let mut mask = 0;
        for (index, word) in lanes.into_iter().enumerate() {
            // The product moves the eight top bits into the top byte.
            let bits = (wanted(word) >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56;
            mask |= bits << (8 * index);
        }
        mask
    }
}

impl Block for Portable {
    type Lanes = [u64; 8];

    #[inline(always)]
    fn load(self, from: &[u8; BLOCK_SIZE]) -> [u64; 8] {
        let (words, _) = from.as_chunks::<8>();
        std::array::from_fn(|index| u64::from_le_bytes(words[index]))
    }

    #[inline(always)]
    fn classify(self, lanes: [u64; 8], to: &mut Classes) {
        let folded = lanes.map(|word| word | (LOW_BITS * 0x20));
        let newline = self.equal(lanes, b'\n');
        *to = Classes {
            quote: self.equal(lanes, b'"'),
            backslash: self.equal(lanes, b'\\'),
            white: self.equal(lanes, b' ')
                | self.equal(lanes, b'\t')
                | self.equal(lanes, b'\r')
                | newline,
            op: self.equal(folded, b'{')
                | self.equal(folded, b'}')
                | self.equal(lanes, b':')
                | self.equal(lanes, b','),
            control: Self::mask(lanes, |word| below(word, 0x20)),
            newline,
            digit: Self::mask(lanes, |word| below(word, b'9' + 1) & !below(word, b'0')),
            high: Self::mask(lanes, |word| word & HIGH_BITS),
        };
    }

    #[inline(always)]
    fn equal(self, lanes: [u64; 8], byte: u8) -> u64 {
        Self::mask(lanes, |word| below(word ^ (LOW_BITS * u64::from(byte)), 1))
    }

    #[inline(always)]
    fn squeeze(self, lanes: [u64; 8], keep: u64, to: &mut [u8; BLOCK_SIZE]) {
        let mut from = [0; BLOCK_SIZE];
        for (index, word) in lanes.into_iter().enumerate() {
            from[8 * index..8 * index + 8].copy_from_slice(&word.to_le_bytes());
        }
        if keep == !0 {
            *to = from;
            return;
        }
        let (mut rest, mut size) = (keep, 0);
        while rest != 0 {
            to[size] = from[rest.trailing_zeros() as usize];
            size += 1;
            rest &= rest - 1;
        }
    }

    #[inline(always)]
    fn prefix_xor(self, mut mask: u64) -> u64 {
        for shift in [1, 2, 4, 8, 16, 32] {
            mask ^= mask << shift;
        }
        mask
    }

    #[inline(always)]
    fn bits_gather(self, value: u64, mut mask: u64) -> u64 {
        let (mut bits, mut index) = (0, 0);
        while mask != 0 {
            bits |= (value >> mask.trailing_zeros() & 1) << index;
            index += 1;
            mask &= mask - 1;
        }
        bits
    }

    #[inline(always)]
    fn bits_scatter(self, mut value: u64, mut mask: u64) -> u64 {
        let mut bits = 0;
        while mask != 0 && value != 0 {
            bits |= (value & 1) << mask.trailing_zeros();
            value >>= 1;
            mask &= mask - 1;
        }
        bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same questions asked byte by byte.
    struct Questions<'a>(&'a [u8; BLOCK_SIZE], u64);

    impl Job for Questions<'_> {
        type Output = ();
        #[inline(always)]
        fn run<B: Block>(self, block: B) {
            let Questions(bytes, keep) = self;
            let mask = |wanted: &dyn Fn(u8) -> bool| {
                bytes.iter().enumerate().fold(0, |mask, (index, &byte)| {
                    mask | u64::from(wanted(byte)) << index
                })
            };
            let lanes = block.load(bytes);
            let mut classes = Classes::default();
            block.classify(lanes, &mut classes);
            assert_eq!(classes.quote, mask(&|b| b == b'"'));
            assert_eq!(classes.backslash, mask(&|b| b == b'\\'));
            assert_eq!(classes.white, mask(&|b| b" \t\n\r".contains(&b)));
            let plain = !mask(&|b| b < 0x20);
            assert_eq!(classes.op & plain, mask(&|b| b"{}[]:,".contains(&b)));
            assert_eq!(classes.control, mask(&|b| b < 0x20));
            assert_eq!(classes.newline, mask(&|b| b == b'\n'));
            assert_eq!(classes.high, mask(&|b| b >= 0x80));
            assert_eq!(classes.digit, mask(&|b| b.is_ascii_digit()));
            for byte in [0, b'"', 0x7F, 0x80, 0xFF, bytes[0]] {
                assert_eq!(block.equal(lanes, byte), mask(&|b| b == byte));
            }
            let mut squeezed = [0; BLOCK_SIZE];
            block.squeeze(lanes, keep, &mut squeezed);
            let kept: Vec<u8> = (0..64)
                .filter(|i| keep >> i & 1 == 1)
                .map(|i| bytes[i])
                .collect();
            assert_eq!(&squeezed[..kept.len()], kept);
            let parity = |i: u32| u64::from((keep << (63 - i)).count_ones() & 1) << i;
            assert_eq!(block.prefix_xor(keep), (0..64).map(parity).sum::<u64>());
            let value = u64::from_le_bytes(*bytes.first_chunk().unwrap());
            assert_eq!(
                block.bits_gather(value, keep),
                Portable.bits_gather(value, keep)
            );
            assert_eq!(
                block.bits_scatter(value, keep),
                Portable.bits_scatter(value, keep)
            );
            let count = keep.count_ones();
            let low = if count == 64 { !0 } else { (1 << count) - 1 };
            assert_eq!(
                block.bits_gather(block.bits_scatter(value, keep), keep),
                value & low
            );
        }
    }

    #[test]
    fn every_implementation_answers_like_a_byte_loop() {
        for set in super::super::InstructionSet::available() {
            let arch = set.arch().unwrap();
            for first in 0..=255_u8 {
                let bytes = std::array::from_fn(|index| {
                    first.wrapping_add((index as u8).wrapping_mul(first | 1))
                });
                for keep in [
                    0,
                    !0,
                    1,
                    1 << 63,
                    0x5555_5555_5555_5555,
                    u64::from(first).wrapping_mul(0x9E37_79B9_7F4A_7C15),
                ] {
                    arch.run(Questions(&bytes, keep));
                }
            }
        }
    }
}
