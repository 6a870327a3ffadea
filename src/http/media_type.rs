//! Media types: which `Content-Type` means which format of records.
//!
//! Before it: the field's value, from [`super::h1`].
//! After it: [`crate::connection`] reads the body if there is a reader for it.
//! Thread: any; pure. Allocates: never.
//! Invariant: decided by the type alone; parameters such as `charset` are ignored, since JSON is UTF-8 (RFC 8259 §8.1).
//! Not here: the formats themselves ([`crate::records`]).

/// The types whose body is JSON: one text, several, or one per line; the reader takes all of them.
const JSON: [&[u8]; 8] = [
    b"application/json",
    b"application/x-ndjson",
    b"application/ndjson",
    b"application/jsonl",
    b"application/x-jsonl",
    b"application/json-lines",
    b"application/x-json-lines",
    b"application/jsonlines",
];

/// RFC 6839 §3.1: the suffix of types that are JSON underneath.
const JSON_SUFFIX: &[u8] = b"+json";

/// Whether a value of `Content-Type` (RFC 9110 §8.3) names JSON or a sequence of it.
pub fn is_json(value: &[u8]) -> bool {
    let end = memchr::memchr(b';', value).unwrap_or(value.len());
    let media_type = value[..end].trim_ascii();
    if JSON
        .iter()
        .any(|json| media_type.eq_ignore_ascii_case(json))
    {
        return true;
    }
    let Some(name_size) = media_type.len().checked_sub(JSON_SUFFIX.len()) else {
        return false;
    };
    let (name, suffix) = media_type.split_at(name_size);
    let mut parts = name.splitn(2, |byte| *byte == b'/');
    suffix.eq_ignore_ascii_case(JSON_SUFFIX)
        && parts.next().is_some_and(super::syntax::is_token)
        && parts.next().is_some_and(super::syntax::is_token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_family_is_known_by_its_type_alone() {
        for value in [
            "application/json",
            "Application/JSON",
            "application/json; charset=utf-8",
            "application/json;charset=latin1",
            "application/json ;",
            "application/x-ndjson",
            "application/jsonl",
            "application/json-lines",
            "application/vnd.github+json; v=3",
            "application/cloudevents-batch+json",
        ] {
            assert!(is_json(value.as_bytes()), "{value}");
        }
        for value in [
            "",
            ";",
            "json",
            "+json",
            "/+json",
            "application/+json",
            "text/json",
            "text/plain",
            "application/jsonp",
            "application/json, application/json",
            "application/json text/plain",
            "application/x-www-form-urlencoded",
            "application/msgpack",
            "multipart/form-data; boundary=application/json",
            "a b/c+json",
            "a/b/c+json",
        ] {
            assert!(!is_json(value.as_bytes()), "{value}");
        }
    }
}
