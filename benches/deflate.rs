//! `deflate`: rows into one gzip member, at the levels worth choosing.
//!
//! Sketch. A large event is 121 KB of row. Level 2 is a hash lookup and a match per position, 300 to 500 MB/s, so 240 to
//! 400 µs; level 1 about 1.5 times that; level 6 a quarter. The CRC is 5 to 10 µs of it. Small rows compress slower per
//! byte, because their matches are shorter.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use weir::deflate::{GzipMember, MEMBER_END_SIZE};
use weir_perf::event::{compact, large_event, ndjson};

const BUFFER_SIZE: usize = 4 << 20;

fn rows(criterion: &mut Criterion) {
    let large: Vec<String> = (0..16)
        .map(|index| compact(&large_event(1, index)))
        .collect();
    let small: Vec<String> = (0..16).map(|index| ndjson(1, index, 1_000)).collect();
    for (name, rows) in [("large rows", large), ("small rows", small)] {
        let size: usize = rows.iter().map(String::len).sum();
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Bytes(size as u64));
        for level in [1, 2, 6] {
            let mut output = vec![0; BUFFER_SIZE];
            let mut member = GzipMember::new(level);
            let mut encode = || {
                member.open(&mut output);
                for row in &rows {
                    assert!(member.fits(&mut output, row.len()));
                    member.append(&mut output, row.as_bytes());
                }
                member.close(&mut output);
                (member.raw_size(), member.size() + MEMBER_END_SIZE)
            };
            let (raw_size, member_size) = encode();
            assert_eq!(raw_size, size as u64);
            assert!(member_size < size / 2, "rows compress");
            println!(
                "{name}, level {level}: {:.3} of the raw size",
                member_size as f64 / size as f64
            );
            group.bench_function(format!("level {level}"), |bencher| {
                bencher.iter(|| black_box(encode()));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, rows);
criterion_main!(benches);
