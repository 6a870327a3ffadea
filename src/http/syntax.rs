//! The characters of HTTP and of the URIs in it, by class.
//!
//! Before it: a line of a head, of a chunk, or of a trailer section.
//! After it: [`super::h1`], [`super::target`] and [`super::chunked`] refuse what is not of its class.
//! Thread: any; pure. Allocates: never.
//! Invariant: one table for all of them, so that no two parts read a byte differently.
//! Not here: what the words made of these characters mean.

/// RFC 9110 §5.6.2: the characters of a token.
const TOKEN: u8 = 1;
/// RFC 9110 §5.5: what a field value may hold, `obs-text` included.
const FIELD: u8 = 2;
/// RFC 3986 §3.3: `pchar`, and `/`; without `%`, which is checked with its digits.
const PATH: u8 = 4;
/// RFC 3986 §3.4: what `query` adds to the path's characters.
const QUERY: u8 = 8;
/// The names and IPv4 addresses of a Host field: RFC 3986's `reg-name` without its sub-delimiters and `%`, which
/// are no part of any name that resolves.
const HOST: u8 = 16;

const CLASSES: [u8; 256] = {
    let mut classes = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let c = byte as u8;
        let mut class = 0;
        let alphanumeric = c.is_ascii_alphanumeric();
        if alphanumeric || is_one_of(c, b"!#$%&'*+-.^_`|~") {
            class |= TOKEN;
        }
        if c == b'\t' || (c >= b' ' && c != 0x7f) {
            class |= FIELD;
        }
        if alphanumeric || is_one_of(c, b"-._~!$&'()*+,;=:@/") {
            class |= PATH | QUERY;
        }
        if c == b'?' {
            class |= QUERY;
        }
        if alphanumeric || is_one_of(c, b"-._~") {
            class |= HOST;
        }
        classes[byte] = class;
        byte += 1;
    }
    classes
};

const fn is_one_of(byte: u8, set: &[u8]) -> bool {
    let mut index = 0;
    while index < set.len() {
        if set[index] == byte {
            return true;
        }
        index += 1;
    }
    false
}

const fn is(byte: u8, class: u8) -> bool {
    CLASSES[byte as usize] & class != 0
}

/// RFC 9110 §5.6.2.
pub const fn is_token_byte(byte: u8) -> bool {
    is(byte, TOKEN)
}

/// RFC 9110 §5.6.2: one or more token characters.
pub fn is_token(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(|byte| is_token_byte(*byte))
}

/// RFC 9110 §5.5.
pub const fn is_field_byte(byte: u8) -> bool {
    is(byte, FIELD)
}

/// RFC 3986 §3.3, without `%`.
pub const fn is_path_byte(byte: u8) -> bool {
    is(byte, PATH)
}

/// RFC 3986 §3.4, without `%`.
pub const fn is_query_byte(byte: u8) -> bool {
    is(byte, QUERY)
}

/// A byte of a registered name or an IPv4 address.
pub const fn is_host_byte(byte: u8) -> bool {
    is(byte, HOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_agrees_with_the_grammars() {
        for byte in 0..=255_u8 {
            let c = char::from(byte);
            let alphanumeric = c.is_ascii_alphanumeric();
            assert_eq!(
                is_token_byte(byte),
                c.is_ascii_graphic() && !"\"(),/:;<=>?@[\\]{}".contains(c),
                "{c:?}"
            );
            assert_eq!(
                is_field_byte(byte),
                byte == 9 || (0x20..=0x7e).contains(&byte) || byte >= 0x80,
                "{c:?}"
            );
            let path = alphanumeric || "-._~!$&'()*+,;=:@/".contains(c);
            assert_eq!(is_path_byte(byte), path, "{c:?}");
            assert_eq!(is_query_byte(byte), path || c == '?', "{c:?}");
            assert_eq!(
                is_host_byte(byte),
                alphanumeric || "-._~".contains(c),
                "{c:?}"
            );
        }
    }
}
