//! What the module promises, for every implementation; the naive twin is the oracle.

use super::*;
use proptest::prelude::*;

#[path = "../../../fuzz/src/naive.rs"]
mod naive;

type Answer = Result<Vec<Vec<u8>>, (&'static str, usize, usize)>;

/// The answer of one implementation; also proves that bytes after the body stay as they are.
fn answer(set: InstructionSet, bytes: &[u8]) -> Answer {
    let mut buffer = [bytes, &[0xA5; 64]].concat();
    let (body, after) = buffer.split_at_mut(bytes.len());
    let mut starts = RecordStarts::with_body_size_max(bytes.len());
    let found = Checker::with_instruction_set(set)
        .unwrap()
        .check(body, &mut starts);
    assert_eq!(after, [0xA5; 64], "{set:?} wrote past the body");
    let found = found.map_err(|error| (error.code, error.offset, error.line))?;
    let records: Vec<Vec<u8>> = starts
        .iter(&body[..found.size])
        .map(<[u8]>::to_vec)
        .collect();
    assert_eq!(records.len(), found.count);
    assert_eq!(records.concat(), &body[..found.size]);
    assert_eq!(
        found.all_objects,
        records.iter().all(|record| record[0] == b'{')
    );
    Ok(records)
}

/// Every implementation and the explainer agree with the twin.
#[track_caller]
fn same_as_twin(bytes: &[u8]) {
    let expected = naive::records(bytes);
    for set in InstructionSet::available() {
        assert_eq!(
            answer(set, bytes),
            expected,
            "{set:?}, {:?}",
            bytes.escape_ascii().to_string()
        );
    }
    let mut resume = Resume {
        offset: 0,
        newline_count: 0,
        carry: Carry::default(),
        state: State::new(),
        any: false,
    };
    let explained =
        explain::explain(bytes, &mut resume).map(|error| (error.code, error.offset, error.line));
    assert_eq!(explained, expected.err());
}

#[track_caller]
fn accepts(body: &str, records: &[&str]) {
    let expected: Answer = Ok(records
        .iter()
        .map(|record| record.as_bytes().to_vec())
        .collect());
    for set in InstructionSet::available() {
        assert_eq!(answer(set, body.as_bytes()), expected, "{set:?}");
    }
    same_as_twin(body.as_bytes());
}

#[track_caller]
fn refuses(body: impl AsRef<[u8]>, code: &'static str, offset: usize, line: usize) {
    let body = body.as_ref();
    for set in InstructionSet::available() {
        assert_eq!(
            answer(set, body),
            Err((code, offset, line)),
            "{set:?}, {}",
            body.escape_ascii()
        );
    }
    same_as_twin(body);
}

#[test]
fn bodies_become_records() {
    accepts("{}", &["{}"]);
    accepts(" { \"a\" : [ 1 , 2 ] } \n", &["{\"a\":[1,2]}"]);
    accepts("{}\n{\"b\": 1}\r\n{}", &["{}", "{\"b\":1}", "{}"]);
    accepts("{}{}[]{}", &["{}", "{}", "{}"]);
    accepts("[]", &[]);
    accepts("[ ]\n[\t]", &[]);
    accepts(
        "[1, \"two\", null, [3, []], {\"4\": 5}]",
        &["1", "\"two\"", "null", "[3,[]]", "{\"4\":5}"],
    );
    accepts("[[1,2],[3]] [4]", &["[1,2]", "[3]", "4"]);
    accepts("[{}, {}]", &["{}", "{}"]);
}

#[test]
fn strings_and_numbers_pass_byte_for_byte() {
    for value in [
        "0",
        "-0",
        "10",
        "-1.5e+300",
        "1e999",
        "1E-9",
        "123456789012345678901234567890",
        "0.10",
        "true",
        "false",
        "null",
        "\"\"",
        r#""\"""#,
        r#""\\""#,
        r#""\/\b\f\n\r\t""#,
        r#""\ud800""#,
        r#""\uDBFF\u00e9""#,
        "\"a  b\u{7F}\"",
        "\"é日😀\"",
        r#"{"a":1,"a":2}"#,
    ] {
        accepts(&format!("[{value}]"), &[value]);
        accepts(
            &format!("{{\"k\": {value} }}"),
            &[&format!("{{\"k\":{value}}}")],
        );
    }
}

#[test]
fn empty_bodies_and_scalars_are_refused() {
    refuses("", codes::EMPTY, 0, 1);
    refuses(" \r\n\t", codes::EMPTY, 4, 2);
    refuses("12", codes::SCALAR, 0, 1);
    refuses("\n\"a\"", codes::SCALAR, 1, 2);
    refuses("{}null", codes::SCALAR, 2, 1);
    refuses("{} -", codes::SCALAR, 3, 1);
}

#[test]
fn the_first_wrong_byte_is_reported() {
    for (body, offset) in [
        ("{},{}", 2),
        ("]", 0),
        ("{}}", 2),
        ("[1,]", 3),
        ("[,1]", 1),
        ("[1 2]", 3),
        ("[1\"a\"]", 2),
        ("[\"a\"1]", 4),
        ("[{}{}]", 3),
        ("[[][]]", 3),
        ("{\"a\":1,}", 7),
        ("{,}", 1),
        ("{1:2}", 1),
        ("{\"a\"}", 4),
        ("{\"a\" 1}", 5),
        ("{\"a\":}", 5),
        ("{\"a\"::1}", 5),
        ("{\"a\":1 \"b\":2}", 7),
        ("{\"a\":1:2}", 6),
        ("{\"a\":1,\"b\"}", 10),
        ("{\"a\":1,{}}", 7),
        ("{\"a\":\"b\":1}", 8),
        ("[\"a\":1]", 4),
        ("[1,\"a\":1]", 6),
        ("[1}", 2),
        ("{\"a\":1]", 6),
        ("{]", 1),
        ("[}", 1),
        ("[[1}]", 3),
        ("{[]:1}", 1),
        ("[:1]", 1),
        ("[01]", 2),
        ("[-]", 2),
        ("[-01]", 3),
        ("[1.]", 3),
        ("[.5]", 1),
        ("[1e]", 3),
        ("[1e+]", 4),
        ("[+1]", 1),
        ("[1-2]", 2),
        ("[0x1]", 2),
        ("[1_0]", 2),
        ("[00]", 2),
        ("[1.2.3]", 4),
        ("[NaN]", 1),
        ("[Infinity]", 1),
        ("[-Infinity]", 2),
        ("[tru]", 4),
        ("[trux]", 4),
        ("[true1]", 5),
        ("[nullnull]", 5),
        ("[fals e]", 5),
        ("[True]", 1),
        ("['a']", 1),
        ("[\\\"a\"]", 1),
        ("[1\\]", 2),
        ("[\"\\x\"]", 3),
        ("[\"\\u12G4\"]", 6),
        ("[\"\\u123\"]", 7),
        ("[\"\\U0041\"]", 3),
        ("[\"a\tb\"]", 3),
        ("[\"\\\n\"]", 3),
        ("[\u{c}]", 1),
        ("[\u{1a}]", 1),
        ("[\u{0}]", 1),
        ("[é]", 1),
        ("é", 0),
        ("\u{FEFF}{}", 0),
        ("{}\u{FEFF}", 2),
        ("{}//", 2),
        ("[1]/**/", 3),
        ("{a:1}", 1),
    ] {
        refuses(body, codes::SYNTAX, offset, 1);
        let nested = format!("{{}}\n\n[\n{body}");
        same_as_twin(nested.as_bytes());
    }
    refuses("{}\n{\n\"a\":\n1 2}", codes::SYNTAX, 12, 4);
    refuses("[\"a\nb\"]", codes::SYNTAX, 3, 1);
}

#[test]
fn utf8_is_checked_in_strings() {
    for wrong in [
        &b"\x80"[..],
        b"\xC0\xAF",
        b"\xC1\xBF",
        b"\xE0\x80\xAF",
        b"\xED\xA0\x80",
        b"\xF0\x80\x80\xAF",
        b"\xF4\x90\x80\x80",
        b"\xF5\x80\x80\x80",
        b"\xFF",
        b"\xE2\x82",
        b"\xE2",
        b"\xF0\x9F\x98",
        b"\xC3\xA9\xA9",
    ] {
        let offset = 2 + if wrong == b"\xC3\xA9\xA9" { 2 } else { 0 };
        refuses([b"[\"", wrong, b"\"]"].concat(), codes::UTF8, offset, 1);
    }
    refuses(b"[\"a\xE2\x82", codes::TRUNCATED, 5, 1);
    refuses(b"[\"\\\xC3\xA9\"]", codes::SYNTAX, 3, 1);
}

#[test]
fn depth_is_limited_for_any_mix_of_containers() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}"), ("[{\"a\":", "}]")] {
        let count = if open.len() == 6 {
            DEPTH_MAX / 2
        } else {
            DEPTH_MAX
        };
        let body = format!("{}[]{}", open.repeat(count), close.repeat(count));
        refuses(&body, codes::DEPTH, open.len() * count, 1);
        let body = format!("{}0{}", open.repeat(count), close.repeat(count));
        assert!(naive::records(body.as_bytes()).is_ok());
        same_as_twin(body.as_bytes());
    }
    for count in [129, 192, 255, 256, 257, 4096, 10_000] {
        refuses("[".repeat(count), codes::DEPTH, 128, 1);
        same_as_twin("]".repeat(count).as_bytes());
        same_as_twin(format!("[{}", "]".repeat(count)).as_bytes());
    }
}

#[test]
fn truncation_at_every_byte_is_an_error_or_what_the_twin_says() {
    for document in [
        r#"{"a": [1, -2.5e+10, "x\u00e9\\", {"b": null}], "é😀": true} {"c": false}"#,
        r#"[ {"a":1}, [2, [3]], "four" ] [] {"x":"\ud800\n"}"#,
    ] {
        for size in 0..document.len() {
            same_as_twin(&document.as_bytes()[..size]);
        }
    }
}

/// Pieces that must not care where blocks and chunks begin, right and wrong ones.
const PIECES: [&[u8]; 27] = [
    b"{\"key\": \"value\", \"k\":[1, 2]}",
    b"[123456789, -0.5e-7, 0, 10]",
    b"[true, false, null]",
    b"[\"\\\\\\\"\\u00e9\\ud800\\n\"]",
    b"[\"\\\\\\\\\\\\\\\\\"]",
    "[\"é日😀é日😀\"]".as_bytes(),
    b"{}{}[1,[2]]",
    b"[\"\\u12x4\"]",
    b"[\"\\q\"]",
    b"[\"\x01\"]",
    b"[\"\\\\\\\\\\x\"]",
    b"[\"\xE2\x82\"]",
    b"[\"\xF0\x9F\x98\x80\x80\"]",
    b"[\"\xC3(\"]",
    b"[trux]",
    b"[12a]",
    b"[1234567890.]",
    b"[01]",
    b"[-01]",
    b"[-x]",
    b"[-]",
    b"{\"a\":1,}",
    b"{\"a\" \"b\"}",
    b"[1 2]",
    b"[1}",
    b"[\\\"]",
    b"{\"a\":[1,{\"b\":\"unfinished",
];

#[test]
fn every_piece_crosses_every_block_boundary() {
    for piece in PIECES {
        for padding in 0..if cfg!(miri) { 3 } else { 130 } {
            same_as_twin(&[&b" ".repeat(padding), piece].concat());
            // In a string, and with line feeds.
            same_as_twin(
                &[
                    b"{\"",
                    "x".repeat(padding).as_bytes(),
                    b"\":\n",
                    piece,
                    b"\n}",
                ]
                .concat(),
            );
            same_as_twin(&[&b"\n{}".repeat(padding), piece].concat());
            // With tokens, so that words of 64 tokens are crossed too.
            same_as_twin(
                &[
                    &b"[".repeat(padding.min(100)),
                    piece,
                    &b"]".repeat(padding.min(100)),
                ]
                .concat(),
            );
            same_as_twin(&[b"[", &b"1,".repeat(padding)[..], piece, b",2]"].concat());
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "too slow there; blocks are covered above")]
fn every_piece_crosses_a_chunk_boundary() {
    for piece in PIECES {
        for before in 0..piece.len() + 2 {
            let padding = CHUNK_SIZE - before;
            same_as_twin(&[&b" ".repeat(padding), piece].concat());
            same_as_twin(&[&b"\n".repeat(CHUNK_SIZE + padding), piece, b"{}"].concat());
            same_as_twin(
                &[
                    b"{\"",
                    "x".repeat(padding - 4).as_bytes(),
                    b"\":",
                    piece,
                    b"}",
                ]
                .concat(),
            );
            same_as_twin(
                &[
                    b"[\"",
                    "é".repeat(padding / 2).as_bytes(),
                    b"\",",
                    piece,
                    b"]",
                ]
                .concat(),
            );
            same_as_twin(&[b"[", &b"1,".repeat(padding / 2)[..], piece, b", {}]"].concat());
            same_as_twin(
                &[
                    &b"{\"a\":[]}\n".repeat(padding / 9),
                    &b" ".repeat(padding % 9)[..],
                    piece,
                ]
                .concat(),
            );
            // A scalar, a string of backslashes and a comma left hanging by the boundary.
            same_as_twin(&[b"[", &b"7".repeat(padding)[..], piece].concat());
            same_as_twin(&[b"[\"", &b"\\".repeat(padding)[..], piece].concat());
            same_as_twin(
                &[
                    b"{\"a\":1,",
                    &b" ".repeat(padding)[..],
                    b"\"b\":",
                    piece,
                    b"}",
                ]
                .concat(),
            );
        }
    }
}

#[test]
fn a_checker_forgets_the_body_before() {
    for set in InstructionSet::available() {
        let mut checker = Checker::with_instruction_set(set).unwrap();
        let mut starts = RecordStarts::with_body_size_max(9000);
        for first in [
            &b"[[[1,2,"[..],
            b"{\"a\":\"\\",
            b"[1,2,3,4,5]",
            b"[\"\xE2\x82",
            &b"]".repeat(300),
            &b"[".repeat(9000),
        ] {
            let _ = checker.check(&mut first.to_vec(), &mut starts);
            let mut body = *b"{ } \n{\"a\": 1}";
            let found = checker.check(&mut body, &mut starts).unwrap();
            assert_eq!(
                found,
                Records {
                    size: 9,
                    count: 2,
                    all_objects: true
                }
            );
            assert_eq!(
                starts.iter(&body[..9]).collect::<Vec<_>>(),
                [&b"{}"[..], b"{\"a\":1}"]
            );
        }
    }
}

#[test]
#[should_panic(expected = "larger than its record starts")]
fn a_body_larger_than_the_starts_is_a_defect_of_the_caller() {
    let _ = Checker::new().check(&mut [b' '; 65], &mut RecordStarts::with_body_size_max(64));
}

fn any_json() -> impl Strategy<Value = serde_json::Value> {
    use serde_json::Value;
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        proptest::collection::vec(any::<char>(), 0..20)
            .prop_map(|chars| Value::from(String::from_iter(chars))),
    ];
    leaf.prop_recursive(6, 200, 12, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..12).prop_map(Value::from),
            proptest::collection::vec(
                (proptest::collection::vec(any::<char>(), 0..9), inner),
                0..12
            )
            .prop_map(|pairs| pairs
                .into_iter()
                .map(|(key, value)| (String::from_iter(key), value))
                .collect()),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 256 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_json_comes_out_compact(values in proptest::collection::vec(any_json(), 1..20)) {
        let expected: Answer = Ok(values.iter().map(|value| value.to_string().into_bytes()).collect());
        let list = serde_json::Value::from(values.clone());
        let stream = |pretty: bool| values.iter().fold(String::new(), |text, value| {
            // A stream may not hold scalars at its top: each value in an array of its own is the same record.
            let array = serde_json::Value::from(vec![value.clone()]);
            text + &if pretty { format!("{array:#}\n") } else { array.to_string() }
        });
        for body in [list.to_string(), format!("{list:#}"), stream(false), stream(true)] {
            for set in InstructionSet::available() {
                prop_assert_eq!(answer(set, body.as_bytes()), expected.clone());
            }
        }
    }

    #[test]
    fn one_wrong_byte_is_judged_like_the_twin_judges_it(value in any_json(), at in any::<prop::sample::Index>(), byte: u8) {
        let mut body = format!("[{value:#}]").into_bytes();
        let at = at.index(body.len());
        body[at] = byte;
        same_as_twin(&body);
    }

    #[test]
    fn punctuation_soup_is_judged_like_the_twin_judges_it(
        soup in proptest::collection::vec(prop::sample::select(br#"{}[]:,""\ 1-e.tn"#.to_vec()), 0..200)
    ) {
        same_as_twin(&soup);
    }
}
