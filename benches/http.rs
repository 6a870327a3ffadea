//! `http::h1` and `http::chunked`: one head, and one large body in chunks.
//!
//! Sketch. A head of curl's size is 150 bytes in six lines: httparse takes about 1 ns per byte and field, the check for
//! bare LFs one pass of memchr: some 150 ns. Decoding is one copy within the second-level cache, 10 GB/s or more:
//! 187 KB in about 15 µs, less where the first chunk needs no move.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use weir::http::chunked::Chunked;
use weir::http::h1::{self, Framing};

const HEAD: &[u8] = b"POST /github/push HTTP/1.1\r\nHost: 127.0.0.1:9880\r\nUser-Agent: curl/7.88.1\r\n\
                      Accept: */*\r\nContent-Type: application/json\r\nContent-Length: 186959\r\n\r\n";

fn head(criterion: &mut Criterion) {
    let parsed = h1::parse(HEAD).unwrap().unwrap();
    assert_eq!(parsed.framing, Framing::Length(186_959));
    let mut group = criterion.benchmark_group("head");
    group.throughput(Throughput::Bytes(HEAD.len() as u64));
    group.bench_function("curl", |bencher| {
        bencher.iter(|| h1::parse(black_box(HEAD)))
    });
    group.finish();
}

fn chunked(criterion: &mut Criterion) {
    let body = weir_perf::event::large_event(1, 0).into_bytes();
    let mut group = criterion.benchmark_group("chunked");
    group.throughput(Throughput::Bytes(body.len() as u64));
    for chunk_size in [1_024, 16_384] {
        let mut wire = Vec::new();
        for chunk in body.chunks(chunk_size) {
            wire.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            wire.extend_from_slice(chunk);
            wire.extend_from_slice(b"\r\n");
        }
        wire.extend_from_slice(b"0\r\n\r\n");
        let decode = |bytes: &mut Vec<u8>| {
            let received = bytes.len();
            let mut chunked = Chunked::new(0);
            assert_eq!(chunked.decode(bytes, received), Ok(true));
            chunked.decoded
        };
        let mut copy = wire.clone();
        let decoded = decode(&mut copy);
        assert_eq!(copy[..decoded], body);
        group.bench_function(format!("chunks of {chunk_size}"), |bencher| {
            bencher.iter_batched_ref(|| wire.clone(), decode, BatchSize::SmallInput);
        });
    }
    group.finish();
}

criterion_group!(benches, head, chunked);
criterion_main!(benches);
