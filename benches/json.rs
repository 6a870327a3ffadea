//! `records::json`: check, split and compact one body.
//!
//! Sketch. The large event is 187 KB with 14,000 tokens in 2,900 blocks of 64 bytes. The resource is instructions, not
//! memory: everything is in the second-level cache. Per block, classify costs about 15 cycles (4 for the classes, 5 for
//! the masks, 3 each for scalars and tokens) and squeeze 3; per 64 tokens, grammar costs 30 cycles, and 5 per bracket:
//! some 24 cycles per block in all, so about 27 µs or 7 GB/s at 2.6 GHz.
//!
//! Each case restores its input with a copy, as the check is in place; `memcpy` is that copy alone.
//! The readers it is compared with build nothing (`IgnoredAny`, `LazyValue`), and do not compact either.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::fmt::Write;
use std::hint::black_box;
use weir::records::json::{Checker, InstructionSet};
use weir::records::{RecordStarts, Records};

/// An event of the reference event's shape: 320 workflows, four spaces of indent.
fn event_large() -> String {
    let mut text = String::from(
        "{\n    \"timestamp\": \"2025-01-02T03:04:05.678Z\",\n    \"event\": {\n        \"name\": \"workflow_run\",\n        \
         \"seconds\": 1763477332\n    },\n    \"error\": null,\n    \"workflows\": {\n",
    );
    for index in 0..320 {
        // Names of 8 to 39 letters, so that nothing lines up with blocks.
        let name = &"continuous_integration_of_every_platform"[..8 + index * 7 % 32];
        let comma = if index == 319 { "" } else { "," };
        write!(
            text,
            "        \".github/workflows/{name}_{index}.yml\": {{\n            \"identifier\": \"Check {name} {index}\",\n            \
             \"path\": \".github/workflows/{name}_{index}.yml\",\n            \
             \"sha\": \"0123456789abcdef0123456789abcdef01234567\",\n            \"outcome\": {{\n                \
             \"result\": 3,\n                \"details\": \"workflow filtered out\"\n            }},\n            \
             \"filter\": {{\n                \"is_filtered_out\": true,\n                \"type\": \"event\",\n                \
             \"reason\": \"workflow not interested in event\"\n            }}\n        }}{comma}\n"
        )
        .unwrap();
    }
    text.push_str("    }\n}\n");
    text
}

fn compact(text: &str) -> String {
    serde_json::from_str::<serde_json::Value>(text)
        .unwrap()
        .to_string()
}

fn ndjson() -> String {
    (0..1000).fold(String::new(), |mut text, index| {
        writeln!(
            text,
            "{{\"timestamp\":\"2024-11-05T19:58:35Z\",\"event\":\"test\",\"message\":\"payload number {index:06} of a steady stream\",\
             \"level\":\"info\",\"latency_ms\":{},\"ok\":true}}",
            index * 37 % 1000
        )
        .unwrap();
        text
    })
}

fn non_ascii() -> String {
    let mut text = String::from("[");
    for index in 0..600 {
        let comma = if index == 0 { "" } else { "," };
        write!(text, "{comma}\n  {{\"название\": \"событие номер {index}\", \"説明\": \"日本語の長い文章です。もう一つの文。\", \"é\": \"😀😀\"}}").unwrap();
    }
    text.push_str("\n]");
    text
}

fn numbers() -> String {
    let mut text = String::from("{\"points\":[");
    for index in 0..10_000_u64 {
        let comma = if index == 0 { "" } else { "," };
        let number = index.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (20 + index % 30);
        write!(
            text,
            "{comma}[{number},{}.{:03},-{}]",
            number % 1000,
            index % 1000,
            index
        )
        .unwrap();
    }
    text.push_str("]}");
    text
}

fn cases() -> Vec<(&'static str, Vec<u8>, usize)> {
    let large = event_large();
    let mut cases = vec![
        ("large_compact", compact(&large).into_bytes(), 1),
        ("large_pretty", large.into_bytes(), 1),
        ("ndjson_1000", ndjson().into_bytes(), 1000),
        ("non_ascii", non_ascii().into_bytes(), 600),
        ("numbers", numbers().into_bytes(), 1),
    ];
    // The event this was built for, where it is at hand.
    if let Ok(bytes) = std::fs::read("../shared/data/sample_trigger.json") {
        cases.push(("reference_event", bytes, 1));
    }
    cases
}

fn json(criterion: &mut Criterion) {
    for (name, source, count) in cases() {
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Bytes(source.len() as u64));
        let mut body = source.clone();
        let mut starts = RecordStarts::with_body_size_max(source.len());

        for set in InstructionSet::available() {
            let mut checker = Checker::with_instruction_set(set).unwrap();
            body.copy_from_slice(&source);
            let expected = checker.check(&mut body, &mut starts).unwrap();
            assert_eq!(expected.count, count);
            assert_eq!(starts.iter(&body[..expected.size]).count(), count);
            for record in starts.iter(&body[..expected.size]) {
                serde_json::from_slice::<serde::de::IgnoredAny>(record).unwrap();
            }
            group.bench_function(format!("weir {set:?}"), |bencher| {
                bencher.iter(|| {
                    body.copy_from_slice(&source);
                    let found: Records = checker.check(black_box(&mut body), &mut starts).unwrap();
                    assert_eq!(found, expected);
                });
            });
        }
        // Readers of one value are given one value at a time; the splitting at line feeds is not measured.
        let lines = name.starts_with("ndjson");
        let values: Vec<&[u8]> = if lines {
            source.trim_ascii_end().split(|&b| b == b'\n').collect()
        } else {
            vec![&source]
        };
        group.bench_function("sonic-rs LazyValue", |bencher| {
            bencher.iter(|| {
                for value in &values {
                    let value: sonic_rs::LazyValue =
                        sonic_rs::from_slice(black_box(value)).unwrap();
                    assert!(!value.as_raw_str().is_empty());
                }
            });
        });
        group.bench_function("serde_json IgnoredAny", |bencher| {
            bencher.iter(|| {
                for value in &values {
                    serde_json::from_slice::<serde::de::IgnoredAny>(black_box(value)).unwrap();
                }
            });
        });
        group.bench_function("memcpy", |bencher| {
            bencher.iter(|| {
                body.copy_from_slice(black_box(&source));
                black_box(&mut body);
            });
        });
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_millis(1000));
    targets = json
}
criterion_main!(benches);
