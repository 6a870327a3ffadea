//! What is read of a certificate: the names in it, and when it expires.
//!
//! Before it: rustls has verified a client's certificate, or loaded the listener's own.
//! After it: [`crate::admission`] knows the principal; metrics and log know the expiry.
//! Thread: a reactor at a handshake, and the uplink's runtime. Allocates: per certificate.
//! Invariant: different subjects have different strings: what could be taken for a separator is escaped.
//! Not here: verifying anything.

use std::fmt::Write;

use rustls::pki_types::CertificateDer;
use x509_parser::asn1_rs::Any;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::x509::{AttributeTypeAndValue, X509Name};

/// The names of a certificate: its subject as an RFC 4514 string, then `dns:NAME` and `uri:URI` for each alternative
/// name of those kinds. None where it cannot be read, or a part of its subject is no text.
pub fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let mut names = Vec::new();
    names.extend(subject(certificate.subject()).filter(|subject| !subject.is_empty()));
    if let Ok(Some(alternatives)) = certificate.subject_alternative_name() {
        names.extend(
            alternatives
                .value
                .general_names
                .iter()
                .filter_map(|name| match name {
                    GeneralName::DNSName(name) => Some(normalised(&format!("dns:{name}"))),
                    GeneralName::URI(uri) => Some(format!("uri:{uri}")),
                    _ => None,
                }),
        );
    }
    names
}

/// As names are compared: case means nothing in the name of a host (RFC 4343).
pub fn normalised(name: &str) -> String {
    match name.starts_with("dns:") {
        true => name.to_ascii_lowercase(),
        false => name.to_owned(),
    }
}

/// When it expires, in seconds since 1970.
pub fn expires_at(certificate: &CertificateDer<'_>) -> Option<i64> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some(certificate.validity().not_after.timestamp())
}

/// RFC 4514 §2.1: the last relative name first.
fn subject(name: &X509Name<'_>) -> Option<String> {
    let mut text = String::new();
    let relative_names: Vec<_> = name.iter_rdn().collect();
    for (index, relative_name) in relative_names.iter().rev().enumerate() {
        for (place, attribute) in relative_name.iter().enumerate() {
            match (index, place) {
                (0, 0) => {}
                (_, 0) => text.push(','),
                _ => text.push('+'),
            }
            push_attribute(&mut text, attribute)?;
        }
    }
    Some(text)
}

/// RFC 4514 §2.3; `None` where the value is no text.
fn push_attribute(text: &mut String, attribute: &AttributeTypeAndValue<'_>) -> Option<()> {
    let kind = attribute.attr_type().to_id_string();
    // RFC 4514 §3.
    let short = match kind.as_str() {
        "2.5.4.3" => "CN",
        "2.5.4.7" => "L",
        "2.5.4.8" => "ST",
        "2.5.4.10" => "O",
        "2.5.4.11" => "OU",
        "2.5.4.6" => "C",
        "2.5.4.9" => "STREET",
        "0.9.2342.19200300.100.1.25" => "DC",
        "0.9.2342.19200300.100.1.1" => "UID",
        other => other,
    };
    text.push_str(short);
    text.push('=');
    push_value(text, &string(attribute.attr_value())?);
    Some(())
}

/// The strings of X.520 that are in use: of one byte per character, or UTF-8.
fn string(value: &Any<'_>) -> Option<String> {
    // UTF8String, PrintableString, IA5String: RFC 5280 §4.1.2.4 wants one of the first two.
    match value.tag().0 {
        12 | 19 | 22 => std::str::from_utf8(value.data).ok().map(str::to_owned),
        _ => None,
    }
}

/// RFC 4514 §2.4.
fn push_value(text: &mut String, value: &str) {
    let last = value.chars().count().saturating_sub(1);
    for (index, character) in value.chars().enumerate() {
        match character {
            '"' | '+' | ',' | ';' | '<' | '>' | '\\' => {
                text.push('\\');
                text.push(character);
            }
            ' ' if index == 0 || index == last => text.push_str("\\ "),
            '#' if index == 0 => text.push_str("\\#"),
            character if character.is_ascii_control() => {
                let _ = write!(text, "\\{:02X}", character as u32);
            }
            character => text.push(character),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    fn named(parts: &[(DnType, &str)], alternatives: Vec<SanType>) -> Vec<String> {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, value) in parts {
            parameters.distinguished_name.push(kind.clone(), *value);
        }
        parameters.subject_alt_names = alternatives;
        parameters.not_after = rcgen::date_time_ymd(2031, 2, 3);
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        assert_eq!(expires_at(certificate.der()), Some(1_927_843_200));
        names(certificate.der())
    }

    #[test]
    fn a_subject_is_written_from_its_end_and_says_what_is_no_separator() {
        let organisation = (DnType::OrganizationName, "Example");
        let written = |name| named(&[organisation.clone(), (DnType::CommonName, name)], vec![]);
        assert_eq!(written("device-1"), ["CN=device-1,O=Example"]);
        assert_eq!(
            written("a,O=Example+\"<\\"),
            ["CN=a\\,O=Example\\+\\\"\\<\\\\,O=Example"]
        );
        assert_eq!(written(" #é\n "), ["CN=\\ #é\\0A\\ ,O=Example"]);
        assert_eq!(written("#"), ["CN=\\#,O=Example"]);
    }

    #[test]
    fn alternative_names_have_their_kind() {
        let alternatives = vec![
            SanType::DnsName("Device-1.example.com".try_into().unwrap()),
            SanType::URI("spiffe://Example/device-1".try_into().unwrap()),
            SanType::IpAddress("127.0.0.1".parse().unwrap()),
        ];
        assert_eq!(
            named(&[], alternatives),
            ["dns:device-1.example.com", "uri:spiffe://Example/device-1"]
        );
        assert_eq!(
            normalised("dns:Device-1.Example.COM"),
            "dns:device-1.example.com"
        );
        assert_eq!(normalised("CN=A"), "CN=A");
    }

    #[test]
    fn what_is_no_certificate_has_no_names() {
        let none = CertificateDer::from(vec![0x30, 0x82]);
        assert_eq!((names(&none), expires_at(&none)), (vec![], None));
    }
}
