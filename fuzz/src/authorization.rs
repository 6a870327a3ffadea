//! The Authorization field, and finding a field at all, against readers that decode a character at a time.

use weir::admission::authorization::{self, Shown};
use weir::limits::BASIC_SIZE_MAX;

pub fn check(value: &[u8]) {
    let mut buffer = [0xA5; BASIC_SIZE_MAX];
    let actual = authorization::parse(value, &mut buffer).map(|shown| match shown {
        Shown::Bearer(token) => ("bearer", token.to_vec()),
        Shown::Basic(user_password) => ("basic", user_password.to_vec()),
    });
    assert_eq!(actual, naive(value), "{}", value.escape_ascii());
}

fn naive(value: &[u8]) -> Option<(&'static str, Vec<u8>)> {
    let space = value.iter().position(|byte| *byte == b' ')?;
    let scheme = value[..space].to_ascii_lowercase();
    let text: &[u8] = {
        let mut text = &value[space..];
        while let [b' ', rest @ ..] = text {
            text = rest;
        }
        text
    };
    match scheme.as_slice() {
        b"bearer" => {
            let mut padding = false;
            for (index, byte) in text.iter().enumerate() {
                let is_token = byte.is_ascii_alphanumeric() || b"-._~+/".contains(byte);
                let is_padding = *byte == b'=' && index > 0;
                if !(is_token && !padding || is_padding) {
                    return None;
                }
                padding |= is_padding;
            }
            (!text.is_empty()).then(|| ("bearer", text.to_vec()))
        }
        b"basic" => {
            let decoded = base64(text)?;
            (decoded.contains(&b':') && decoded.len() <= BASIC_SIZE_MAX)
                .then_some(("basic", decoded))
        }
        _ => None,
    }
}

/// RFC 4648 §4, canonical only: padded, and with no bit set that is dropped.
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let mut decoded = Vec::new();
    let groups = text.len() / 4;
    for (index, group) in text.chunks(4).enumerate() {
        let padding = group.iter().rev().take_while(|byte| **byte == b'=').count();
        if padding > 2 || (padding > 0 && index + 1 < groups) {
            return None;
        }
        let mut bits = 0_u32;
        for byte in &group[..4 - padding] {
            let digit = match byte {
                b'A'..=b'Z' => byte - b'A',
                b'a'..=b'z' => byte - b'a' + 26,
                b'0'..=b'9' => byte - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(digit);
        }
        bits <<= 6 * padding;
        let bytes = bits.to_be_bytes();
        let (kept, dropped) = bytes[1..].split_at(3 - padding);
        if dropped.iter().any(|byte| *byte != 0) {
            return None;
        }
        decoded.extend_from_slice(kept);
    }
    Some(decoded)
}
