//! The bodies of the fuzz targets: each takes any bytes and panics if weir and its oracles disagree.
//!
//! Called by `fuzz_targets/*.rs` with what the fuzzer makes up, and by `tests/fuzz_corpus.rs` with the committed corpora.
//! An own crate, so that the oracles stay out of weir's dependencies.

mod authorization;
mod config;
mod connection;
mod http1;
mod http2;
pub mod naive;
mod node;
mod proxy;
mod reference;
mod segment;

use serde_json::value::RawValue;
use weir::records::RecordStarts;
use weir::records::json::{Checker, InstructionSet, JsonError};

/// Bytes after the body, which nobody may touch.
const GUARD: [u8; 64] = [0xA5; 64];

/// `http::h1` and `http::chunked`, cut anywhere, against a naive decoder.
pub fn http1(bytes: &[u8]) {
    http1::check(bytes);
}

/// `spool::recover` and `spool::reader`, on any file and on good ones that were tampered with.
pub fn segment(bytes: &[u8]) {
    segment::check(bytes);
}

/// A connection of a running node, against a strict reading of the same bytes.
pub fn connection(bytes: &[u8]) {
    connection::check(bytes);
}

/// `http::frames`, `http::h2`, and connections of a running node, against a model of the frames that were sent.
pub fn http2(bytes: &[u8]) {
    http2::check(bytes);
}

/// `http::proxy`, cut anywhere, against a naive reader.
pub fn proxy(bytes: &[u8]) {
    proxy::check(bytes);
}

/// `admission::authorization`, against a naive reader.
pub fn authorization(bytes: &[u8]) {
    authorization::check(bytes);
}

/// `config`: valid or in error, never a panic.
pub fn config(bytes: &[u8]) {
    config::check(bytes);
}

/// `records::json` in each implementation, against its naive twin (records, code, offset, line) and serde_json
/// (accepted or not, values).
pub fn json(bytes: &[u8]) {
    let expected = naive::records(bytes);
    for set in InstructionSet::available() {
        let actual = check(set, bytes);
        let actual = actual
            .as_ref()
            .map_err(|error| (error.code, error.offset, error.line));
        assert_eq!(
            actual,
            expected.as_ref().map_err(|refusal| *refusal),
            "{set:?} on {:?}",
            bytes.escape_ascii()
        );
    }
    against_serde(bytes, &expected);
}

/// The records of `bytes` by one implementation, with what must hold of any answer.
pub fn check(set: InstructionSet, bytes: &[u8]) -> Result<Vec<Vec<u8>>, JsonError> {
    let mut checker = Checker::with_instruction_set(set).expect("an available instruction set");
    let mut starts = RecordStarts::with_body_size_max(bytes.len());
    let mut buffer = [bytes, &GUARD].concat();
    let (body, guard) = buffer.split_at_mut(bytes.len());
    let result = checker.check(body, &mut starts);
    assert_eq!(guard, GUARD, "{set:?} wrote past the body");
    let found = result?;
    assert!(found.size <= body.len());
    let records: Vec<Vec<u8>> = starts
        .iter(&body[..found.size])
        .map(<[u8]>::to_vec)
        .collect();
    assert_eq!(records.len(), found.count);
    assert_eq!(
        records.concat(),
        &body[..found.size],
        "records are not adjacent"
    );
    assert_eq!(
        records.iter().all(|record| record[0] == b'{'),
        found.all_objects
    );
    assert_eq!(
        starts.record_size_max(&body[..found.size]),
        records.iter().map(Vec::len).max().unwrap_or(0)
    );
    Ok(records)
}

/// serde_json reads a body as a stream of raw values. Where it differs from weir by design:
/// - depth: built with `unbounded_depth` and counted here, as its limit cannot be set to ours;
/// - a scalar at the top is a value to it, `json_scalar` to weir;
/// - no value at all is an empty stream to it, `empty_body` to weir;
/// - a raw value is checked, but its white space and numbers are untouched: both sides are compared as text without
///   white space, so `1e999`, duplicate keys and lone surrogates are no exceptions.
fn against_serde(bytes: &[u8], expected: &Result<Vec<Vec<u8>>, naive::Refusal>) {
    if depth(bytes) > 128 {
        assert!(expected.is_err());
        return;
    }
    let accepted = serde_records(bytes);
    match (expected, accepted) {
        (Ok(ours), Some(theirs)) => assert_eq!(ours, &theirs),
        (Err(_), None) => {}
        (ours, theirs) => panic!("weir's answer is {ours:?}, serde_json's {theirs:?}"),
    }
}

/// The compact records by serde_json; None if any value is wrong, a scalar, or there is none.
fn serde_records(bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut records = Vec::new();
    let mut any = false;
    let text = std::str::from_utf8(bytes).ok()?;
    let mut values = serde_json::Deserializer::from_str(text);
    values.disable_recursion_limit();
    for value in values.into_iter::<&RawValue>() {
        any = true;
        let value = value.ok()?.get().trim();
        match value.as_bytes().first()? {
            b'{' => records.push(compact(value)),
            b'[' => {
                // An array that was accepted as a raw value is accepted as a list of them.
                let mut array = serde_json::Deserializer::from_str(value);
                array.disable_recursion_limit();
                let elements: Vec<&RawValue> =
                    serde::Deserialize::deserialize(&mut array).expect("an accepted array");
                records.extend(elements.into_iter().map(|element| compact(element.get())));
            }
            _ => return None,
        }
    }
    any.then_some(records)
}

/// How deep the containers of `body` go, strings skipped, without any other check.
fn depth(body: &[u8]) -> usize {
    let (mut depth, mut deepest, mut string, mut escaped) = (0_usize, 0, false, false);
    for &byte in body {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if string => escaped = true,
            b'"' => string = !string,
            b'{' | b'[' if !string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' if !string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

fn compact(value: &str) -> Vec<u8> {
    let (mut string, mut escaped) = (false, false);
    let mut keep = |byte: &u8| {
        let white = !string && matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => string = !string,
            _ => {}
        }
        !white
    };
    value.bytes().filter(|byte| keep(byte)).collect()
}
