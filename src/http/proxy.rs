//! The PROXY protocol, versions 1 and 2: who a proxy's connection is really from.
//!
//! Before it: the first bytes of a connection from an address in `listener.proxies`.
//! After it: [`crate::admission`] and the limits per address see the source that the proxy names.
//! Thread: any; pure. Allocates: never.
//! Invariant: the header is expected or not by the peer's address alone, never guessed from the bytes: whoever could
//! choose would choose an address too.
//! Not here: what a version 2 header says besides the addresses; its fields are checked for form and skipped.
//!
//! Source: "The PROXY protocol", version 2.3, HAProxy; sections 2.1 and 2.2.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::error::Reject;
use crate::limits::PROXY_HEADER_SIZE_MAX;

/// A complete header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of it.
    pub size: usize,
    /// `None` where the proxy speaks for itself or does not know; the connection's own address then counts.
    pub source: Option<IpAddr>,
}

const SIGNATURE_V1: &[u8] = b"PROXY ";
const SIGNATURE_V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// The longest line of version 1, with its CRLF.
const LINE_SIZE_MAX: usize = 107;

/// Signature, version and command, family and protocol, length.
const FIXED_SIZE: usize = SIGNATURE_V2.len() + 4;

/// Reads the header at the start of `bytes`; `None` while it is incomplete.
pub fn parse(bytes: &[u8]) -> Result<Option<Header>, Reject> {
    let begins = |signature: &[u8]| {
        let size = bytes.len().min(signature.len());
        bytes[..size] == signature[..size]
    };
    if begins(SIGNATURE_V1) {
        parse_line(bytes)
    } else if begins(SIGNATURE_V2) {
        parse_binary(bytes)
    } else {
        Err(Reject::Proxy(
            "a proxy's connection begins with a PROXY header",
        ))
    }
}

fn parse_line(bytes: &[u8]) -> Result<Option<Header>, Reject> {
    const FAULT: Reject = Reject::Proxy("a malformed PROXY line");
    let window = &bytes[..bytes.len().min(LINE_SIZE_MAX)];
    let Some(end) = memchr::memchr(b'\n', window) else {
        return match window.len() {
            LINE_SIZE_MAX => Err(FAULT),
            _ => Ok(None),
        };
    };
    let line = window[..end].strip_suffix(b"\r").ok_or(FAULT)?;
    let line = std::str::from_utf8(line).map_err(|_| FAULT)?;
    let size = end + 1;
    let mut words = line.split(' ').skip(1);
    let source = match words.next() {
        // What follows is to be ignored.
        Some("UNKNOWN") => return Ok(Some(Header { size, source: None })),
        Some("TCP4") => addresses::<Ipv4Addr>(&mut words).map(IpAddr::from),
        Some("TCP6") => addresses::<Ipv6Addr>(&mut words).map(IpAddr::from),
        _ => None,
    };
    if source.is_none() || words.next().is_some() {
        return Err(FAULT);
    }
    Ok(Some(Header { size, source }))
}

/// Source and destination, and their ports; the source.
fn addresses<'a, A: std::str::FromStr>(words: &mut impl Iterator<Item = &'a str>) -> Option<A> {
    let source = words.next()?.parse().ok()?;
    words.next()?.parse::<A>().ok()?;
    for _ in 0..2 {
        let port = words.next()?;
        let number: u16 = port.parse().ok()?;
        // No sign and no leading zeros.
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        if !digits || (port.len() > 1 && port.starts_with('0')) || (number == 0 && port != "0") {
            return None;
        }
    }
    Some(source)
}

fn parse_binary(bytes: &[u8]) -> Result<Option<Header>, Reject> {
    const FAULT: Reject = Reject::Proxy("a malformed PROXY header");
    let Some(fixed) = bytes.get(..FIXED_SIZE) else {
        return Ok(None);
    };
    let [command, family, high, low] = [12, 13, 14, 15].map(|at: usize| fixed[at]);
    let is_local = match command {
        0x20 => true,
        0x21 => false,
        _ => return Err(FAULT),
    };
    let size = FIXED_SIZE + usize::from(u16::from_be_bytes([high, low]));
    if size > PROXY_HEADER_SIZE_MAX {
        return Err(Reject::Proxy("a PROXY header of more than 4 KiB"));
    }
    // Both addresses and both ports.
    let addresses_size = match family {
        0x00 => 0,
        0x11 | 0x12 => 2 * (4 + 2),
        0x21 | 0x22 => 2 * (16 + 2),
        0x31 | 0x32 => 2 * 108,
        _ => return Err(FAULT),
    };
    let Some(rest) = bytes.get(FIXED_SIZE..size) else {
        return Ok(None);
    };
    if is_local {
        // The receiver MUST discard the rest.
        return Ok(Some(Header { size, source: None }));
    }
    let (addresses, fields) = rest.split_at_checked(addresses_size).ok_or(FAULT)?;
    // Where the family says nothing, nothing is known about what follows.
    if family != 0 && !are_fields(fields) {
        return Err(FAULT);
    }
    let source = match family {
        0x11 => addresses
            .first_chunk::<4>()
            .map(|octets| Ipv4Addr::from(*octets).into()),
        0x21 => addresses
            .first_chunk::<16>()
            .map(|octets| Ipv6Addr::from(*octets).into()),
        // Not of a TCP connection over IP.
        _ => None,
    };
    Ok(Some(Header { size, source }))
}

/// Whether `rest` is a sequence of type, length and value.
fn are_fields(mut rest: &[u8]) -> bool {
    // Every turn consumes three bytes or more, or ends.
    while let [_, high, low, after @ ..] = rest {
        let size = usize::from(u16::from_be_bytes([*high, *low]));
        match after.get(size..) {
            Some(next) => rest = next,
            None => return false,
        }
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(bytes: &[u8]) -> Result<Option<Option<String>>, ()> {
        match parse(bytes) {
            Ok(header) => Ok(header.map(|header| {
                assert!(header.size <= bytes.len());
                header.source.map(|source| source.to_string())
            })),
            Err(Reject::Proxy(_)) => Err(()),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_line_names_the_source() {
        for (line, expected) in [
            (
                "PROXY TCP4 192.168.0.1 10.0.0.1 56324 443",
                Some("192.168.0.1"),
            ),
            (
                "PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535",
                Some("255.255.255.255"),
            ),
            ("PROXY TCP6 2001:db8::1 ::1 0 1", Some("2001:db8::1")),
            ("PROXY UNKNOWN", None),
            ("PROXY UNKNOWN ffff::1 ffff::2 1 2", None),
        ] {
            let wire = format!("{line}\r\nGET / HTTP/1.1\r\n");
            let size = line.len() + 2;
            for end in 0..size {
                assert_eq!(parse(&wire.as_bytes()[..end]), Ok(None), "{line} {end}");
            }
            assert_eq!(
                source(wire.as_bytes()),
                Ok(Some(expected.map(str::to_owned))),
                "{line}"
            );
            assert_eq!(parse(wire.as_bytes()).unwrap().unwrap().size, size);
        }
    }

    #[test]
    fn a_malformed_line_is_refused() {
        for line in [
            "PROXY\r\n",
            "PROXY \r\n",
            "PROXY TCP4\r\n",
            "PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
            "PROXY TCP4 1.2.3.4 5.6.7.8 1 2 \r\n",
            "PROXY TCP4 1.2.3.4 5.6.7.8 1 2 3\r\n",
            "PROXY  TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
            "PROXY TCP4 1.2.3.4  5.6.7.8 1 2\r\n",
            "PROXY TCP4 1.2.3 5.6.7.8 1 2\r\n",
            "PROXY TCP4 01.2.3.4 5.6.7.8 1 2\r\n",
            "PROXY TCP4 ::1 ::1 1 2\r\n",
            "PROXY TCP6 1.2.3.4 5.6.7.8 1 2\r\n",
            "PROXY TCP4 1.2.3.4 5.6.7.8 65536 2\r\n",
            "PROXY TCP4 1.2.3.4 5.6.7.8 +1 2\r\n",
            "PROXY TCP4 1.2.3.4 5.6.7.8 01 2\r\n",
            "PROXY TCP4 1.2.3.4 5.6.7.8 00 2\r\n",
            "PROXY TCP4 1.2.3.4 5.6.7.8 1 2\n",
            "PROXY tcp4 1.2.3.4 5.6.7.8 1 2\r\n",
            "proxy ",
            "PROXX",
            "GET / HTTP/1.1\r\n",
            "\r\n\r\n\0\r\nQUIX",
            &format!("PROXY UNKNOWN {}\r\n", "x".repeat(100)),
            "PROXY UNKNOWN \u{e9}\n",
        ] {
            assert_eq!(source(line.as_bytes()), Err(()), "{line:?}");
        }
    }

    fn binary(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let size = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [SIGNATURE_V2, &[command, family], &size, rest].concat()
    }

    #[test]
    fn a_binary_header_names_the_source() {
        let v4: &[u8] = &[1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 0, 2];
        let v6 = [&[0xfe][..], &[0; 14], &[1], &[0; 16], &[0; 4]].concat();
        let field: &[u8] = &[0x04, 0, 2, 9, 9];
        for (command, family, rest, expected) in [
            (0x21, 0x11, v4.to_vec(), Some("1.2.3.4")),
            (0x21, 0x11, [v4, field, field].concat(), Some("1.2.3.4")),
            (0x21, 0x21, v6.clone(), Some("fe00::1")),
            (0x21, 0x21, [&v6, field].concat(), Some("fe00::1")),
            (0x21, 0x12, v4.to_vec(), None),
            (0x21, 0x31, vec![0; 216], None),
            (0x21, 0x00, vec![1, 2, 3], None),
            (0x20, 0x00, vec![], None),
            (0x20, 0x11, v4.to_vec(), None),
        ] {
            let mut wire = binary(command, family, &rest);
            let size = wire.len();
            for end in 0..size {
                assert_eq!(parse(&wire[..end]), Ok(None), "{end}");
            }
            wire.extend_from_slice(b"GET / HTTP/1.1\r\n");
            assert_eq!(source(&wire), Ok(Some(expected.map(str::to_owned))));
            assert_eq!(parse(&wire).unwrap().unwrap().size, size);
        }
    }

    #[test]
    fn a_malformed_binary_header_is_refused() {
        let v4: &[u8] = &[1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 0, 2];
        for wire in [
            binary(0x11, 0x11, v4),
            binary(0x22, 0x11, v4),
            binary(0x21, 0x13, v4),
            binary(0x21, 0x41, v4),
            binary(0x21, 0x11, &v4[..11]),
            binary(0x21, 0x21, v4),
            binary(0x21, 0x11, &[v4, &[4]].concat()),
            binary(0x21, 0x11, &[v4, &[4, 0, 2, 9]].concat()),
            binary(0x21, 0x11, &vec![0; PROXY_HEADER_SIZE_MAX]),
        ] {
            assert_eq!(source(&wire), Err(()), "{wire:?}");
        }
    }
}
