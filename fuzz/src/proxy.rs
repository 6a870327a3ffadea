//! The PROXY header, against a reader that takes the whole of it for granted.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use weir::http::proxy::{self, Header};

pub fn check(bytes: &[u8]) {
    let whole = proxy::parse(bytes);
    let naive = naive(bytes);
    match whole {
        Ok(Some(Header { size, source })) => {
            assert_eq!(naive, Some((size, source)), "{}", bytes.escape_ascii());
            for end in 0..size {
                assert_eq!(proxy::parse(&bytes[..end]), Ok(None), "{end}");
            }
            assert_eq!(proxy::parse(&bytes[..size]), whole);
        }
        // Refused once is refused with more behind it, and incomplete is not yet anything.
        Ok(None) | Err(_) => assert_eq!(naive, None, "{}", bytes.escape_ascii()),
    }
    if let Some(end) = (0..bytes.len()).find(|end| proxy::parse(&bytes[..*end]).is_err()) {
        assert!(whole.is_err(), "refused at {end}: {}", bytes.escape_ascii());
    }
}

/// The size and the source of a well-formed header; `None` for everything else.
fn naive(bytes: &[u8]) -> Option<(usize, Option<IpAddr>)> {
    if bytes.starts_with(b"PROXY ") {
        let end = bytes.windows(2).position(|pair| pair == b"\r\n")?;
        let line = std::str::from_utf8(&bytes[..end]).ok()?;
        if end + 2 > 107 || line.contains('\n') {
            return None;
        }
        let words: Vec<&str> = line.split(' ').collect();
        let source = match words[..] {
            [_, "UNKNOWN", ..] => None,
            [
                _,
                family,
                source,
                destination,
                source_port,
                destination_port,
            ] => {
                for port in [source_port, destination_port] {
                    // The only way to write it.
                    (port.parse::<u16>().ok()?.to_string() == port).then_some(())?;
                }
                match family {
                    "TCP4" => {
                        destination.parse::<Ipv4Addr>().ok()?;
                        Some(source.parse::<Ipv4Addr>().ok()?.into())
                    }
                    "TCP6" => {
                        destination.parse::<Ipv6Addr>().ok()?;
                        Some(source.parse::<Ipv6Addr>().ok()?.into())
                    }
                    _ => return None,
                }
            }
            _ => return None,
        };
        return Some((end + 2, source));
    }
    let rest = bytes.strip_prefix(b"\r\n\r\n\0\r\nQUIT\n")?;
    let [command, family, high, low, rest @ ..] = rest else {
        return None;
    };
    let size = 256 * usize::from(*high) + usize::from(*low);
    let rest = rest.get(..size).filter(|_| size + 16 <= 4096)?;
    let known = [0x00, 0x11, 0x12, 0x21, 0x22, 0x31, 0x32];
    if !known.contains(family) {
        return None;
    }
    let source = match (command, family) {
        (0x20, _) | (0x21, 0x00) => None,
        (0x21, 0x11) => {
            fields(rest.get(12..)?)?;
            Some(IpAddr::from([rest[0], rest[1], rest[2], rest[3]]))
        }
        (0x21, 0x12) => fields(rest.get(12..)?).map(|()| None)?,
        (0x21, 0x21) => {
            fields(rest.get(36..)?)?;
            let octets: [u8; 16] = rest[..16].try_into().ok()?;
            Some(IpAddr::from(octets))
        }
        (0x21, 0x22) => fields(rest.get(36..)?).map(|()| None)?,
        (0x21, _) => fields(rest.get(216..)?).map(|()| None)?,
        _ => return None,
    };
    Some((16 + size, source))
}

fn fields(rest: &[u8]) -> Option<()> {
    match rest {
        [] => Some(()),
        [_, high, low, rest @ ..] => {
            let size = 256 * usize::from(*high) + usize::from(*low);
            fields(rest.get(size..)?)
        }
        _ => None,
    }
}
