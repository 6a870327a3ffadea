//! A strict reader of HTTP/1.1 requests: slow, on the heap, with the whole stream at hand.
//!
//! An oracle, so it shares no code with the modules it judges: no table, no search, no in-place decoding.
//! Where RFC 9110 and 9112 leave a choice it refuses, as weir promises to.

/// What one request is, from its first byte to the last that belongs to it.
pub struct Request {
    /// Bytes of the stream that it takes.
    pub size: usize,
    pub body: Vec<u8>,
    /// Whether a server that stores JSON may store it.
    pub storable: bool,
}

/// Why there is no request.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused;

/// The request at the start of `stream`, if all of it is there and nothing about it can be read in two ways.
pub fn request(stream: &[u8]) -> Result<Request, Refused> {
    let mut rest = stream;
    let line = text(line(&mut rest)?)?;
    let words: Vec<&str> = line.split(' ').collect();
    let [method, target, version] = words[..] else {
        return Err(Refused);
    };
    let minor = match version {
        "HTTP/1.1" => 1,
        "HTTP/1.0" => 0,
        _ => return Err(Refused),
    };
    if !is_token(method.as_bytes()) || line.len() > 8 * 1024 {
        return Err(Refused);
    }
    let fields = fields(&mut rest)?;
    let head_size = stream.len() - rest.len();
    if head_size > 16 * 1024 || fields.len() > 64 {
        return Err(Refused);
    }
    let values = |name: &str| -> Vec<&[u8]> {
        fields
            .iter()
            .filter(|(field, _)| field.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_slice())
            .collect()
    };
    let single = |name: &str| match values(name)[..] {
        [] => Ok(None),
        [value] => Ok(Some(value)),
        _ => Err(Refused),
    };
    for name in ["authorization", "x-hub-signature", "x-hub-signature-256"] {
        single(name)?;
    }
    let host = single("host")?;
    check_host(host, minor)?;
    check_target(method, target, host)?;
    let coding = single("transfer-encoding")?;
    let length = single("content-length")?;
    let body = match (coding, length) {
        (Some(_), Some(_)) => return Err(Refused),
        (None, None) => Vec::new(),
        (None, Some(length)) => {
            let length = usize::try_from(number(length)?).map_err(|_| Refused)?;
            let body = rest.get(..length).ok_or(Refused)?.to_vec();
            rest = &rest[length..];
            body
        }
        (Some(coding), None) => {
            if !coding.eq_ignore_ascii_case(b"chunked") || minor == 0 {
                return Err(Refused);
            }
            let (body, after) = super::http1::naive(rest)
                .map_err(|_| Refused)?
                .ok_or(Refused)?;
            let size = rest.len() - after.len();
            rest = &rest[size..];
            body
        }
    };
    let media_type = single("content-type")?;
    let content_coding = single("content-encoding")?;
    let expectations = values("expect");
    let met = |value: &&[u8]| value.eq_ignore_ascii_case(b"100-continue");
    Ok(Request {
        size: stream.len() - rest.len(),
        body,
        storable: matches!(method, "POST" | "PUT")
            && media_type.is_none_or(is_json)
            && content_coding.is_none_or(|coding| coding.eq_ignore_ascii_case(b"identity"))
            && (minor == 0 || expectations.iter().all(met)),
    })
}

/// A line and its CRLF; neither of the two is anywhere else.
fn line<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], Refused> {
    let bytes: &'a [u8] = rest;
    let end = bytes
        .iter()
        .position(|byte| *byte == b'\n')
        .ok_or(Refused)?;
    let line = bytes[..end].strip_suffix(b"\r").ok_or(Refused)?;
    if line.contains(&b'\r') {
        return Err(Refused);
    }
    *rest = &bytes[end + 1..];
    Ok(line)
}

fn text(bytes: &[u8]) -> Result<&str, Refused> {
    std::str::from_utf8(bytes).map_err(|_| Refused)
}

fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty()
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_graphic() && !b"\"(),/:;<=>?@[\\]{}".contains(byte))
}

/// Names and values, up to and with the empty line.
fn fields(rest: &mut &[u8]) -> Result<Vec<(String, Vec<u8>)>, Refused> {
    let mut fields = Vec::new();
    loop {
        let line = line(rest)?;
        if line.is_empty() {
            return Ok(fields);
        }
        let colon = line.iter().position(|byte| *byte == b':').ok_or(Refused)?;
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        let is_control = |byte: &u8| (*byte < b' ' && *byte != b'\t') || *byte == 127;
        if !is_token(name) || value.iter().any(is_control) {
            return Err(Refused);
        }
        let name = text(name)?.to_owned();
        let frames = ["content-length", "transfer-encoding"]
            .iter()
            .any(|known| name.eq_ignore_ascii_case(known));
        if frames && value.contains(&b'\t') {
            return Err(Refused);
        }
        fields.push((name, value.trim_ascii().to_vec()));
    }
}

fn number(value: &[u8]) -> Result<u64, Refused> {
    if !value.iter().all(u8::is_ascii_digit) {
        return Err(Refused);
    }
    let number: u64 = text(value)?.parse().map_err(|_| Refused)?;
    i64::try_from(number).map(|_| number).map_err(|_| Refused)
}

fn check_host(host: Option<&[u8]>, minor: u32) -> Result<(), Refused> {
    match host {
        None if minor == 0 => Ok(()),
        None => Err(Refused),
        Some(host) => check_authority(text(host)?),
    }
}

fn check_authority(authority: &str) -> Result<(), Refused> {
    let (name, port) = match authority.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, Some(port)),
        _ => (authority, None),
    };
    if let Some(port) = port {
        let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        let number = port.trim_start_matches('0');
        if !digits || number.len() > 5 || number.parse::<u32>().unwrap_or(0) > 65_535 {
            return Err(Refused);
        }
    }
    let is_name = !name.is_empty()
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-._~".contains(c));
    let literal = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'));
    let is_address = literal.is_some_and(|text| text.parse::<std::net::Ipv6Addr>().is_ok());
    if is_name || is_address {
        Ok(())
    } else {
        Err(Refused)
    }
}

fn check_target(method: &str, target: &str, host: Option<&[u8]>) -> Result<(), Refused> {
    match (method, target) {
        ("OPTIONS", "*") => return Ok(()),
        ("CONNECT", target) if !target.starts_with('/') => return check_authority(target),
        _ => {}
    }
    let (path, query) = match target.split_once('?') {
        Some((path, query)) => (path, query),
        None => (target, ""),
    };
    let lower = path.to_ascii_lowercase();
    let scheme = ["http://", "https://"]
        .into_iter()
        .find(|scheme| lower.starts_with(scheme));
    let path = match scheme {
        None => path,
        Some(scheme) => {
            let rest = &path[scheme.len()..];
            let (authority, path) = match rest.find('/') {
                Some(at) => rest.split_at(at),
                None => (rest, "/"),
            };
            check_authority(authority)?;
            if host.is_some_and(|host| !host.eq_ignore_ascii_case(authority.as_bytes())) {
                return Err(Refused);
            }
            path
        }
    };
    let segments = path.strip_prefix('/').ok_or(Refused)?;
    let count = segments.split('/').count();
    for (index, segment) in segments.split('/').enumerate() {
        let decoded = decoded(segment, "-._~!$&'()*+,;=:@")?;
        let is_last = index + 1 == count;
        if (segment.is_empty() && !is_last) || decoded == b"." || decoded == b".." {
            return Err(Refused);
        }
        text(&decoded)?;
    }
    decoded(query, "-._~!$&'()*+,;=:@/?").map(drop)
}

fn decoded(text: &str, marks: &str) -> Result<Vec<u8>, Refused> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let c = char::from(byte);
        if c == '%' {
            let mut digit = || {
                let digit = rest.next().ok_or(Refused)?;
                char::from(digit).to_digit(16).ok_or(Refused)
            };
            let byte = (16 * digit()? + digit()?) as u8;
            if byte < 32 || byte == 127 {
                return Err(Refused);
            }
            bytes.push(byte);
        } else if c.is_ascii_alphanumeric() || (c.is_ascii() && marks.contains(c)) {
            bytes.push(byte);
        } else {
            return Err(Refused);
        }
    }
    Ok(bytes)
}

fn is_json(value: &[u8]) -> bool {
    let Ok(value) = std::str::from_utf8(value) else {
        // A parameter may hold anything; a type may not.
        let end = value.iter().position(|byte| *byte == b';');
        return end.is_some_and(|end| is_json(&value[..end]));
    };
    let media_type = value
        .split(';')
        .next()
        .unwrap_or("")
        .trim_ascii()
        .to_ascii_lowercase();
    let Some((kind, name)) = media_type.split_once('/') else {
        return false;
    };
    let lines = [
        "json",
        "x-ndjson",
        "ndjson",
        "jsonl",
        "x-jsonl",
        "json-lines",
        "x-json-lines",
        "jsonlines",
    ];
    let suffixed = name
        .strip_suffix("+json")
        .is_some_and(|name| is_token(name.as_bytes()));
    (kind == "application" && lines.contains(&name)) || (suffixed && is_token(kind.as_bytes()))
}
