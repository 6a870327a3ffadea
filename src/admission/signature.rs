//! Signatures: HMAC-SHA-256 (RFC 2104) over the body, in a field of the head.
//!
//! Before it: a head, then the body as it was sent: without chunked framing, not yet compacted.
//! After it: the principal whose secret made the signature.
//! Thread: any; pure once loaded. Allocates: at start.
//! Invariant: compared in constant time, and with the whole of it.
//! Not here: which principals a route takes.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::{Choice, ConstantTimeEq};

use crate::config::{self, SignatureEncoding};
use crate::error::Reject;
use crate::http::h1;
use crate::secret::SecretError;

/// Bytes of a SHA-256.
const SIZE: usize = 32;

pub type Signature = [u8; SIZE];

/// How one principal signs.
pub struct Signer {
    pub principal_index: usize,
    /// With their keys, before the first byte of a body.
    keys: Vec<Hmac<Sha256>>,
    header: String,
    prefix: String,
    encoding: SignatureEncoding,
}

impl Signer {
    pub fn load(principal_index: usize, config: &config::Hmac) -> Result<Self, SecretError> {
        let mut keys = Vec::with_capacity(config.secrets.len());
        for secret in &config.secrets {
            let secret = secret.read()?;
            let key = Hmac::new_from_slice(secret.expose().as_bytes());
            keys.push(key.expect("a key of any length will do (RFC 2104 §3)"));
        }
        Ok(Signer {
            principal_index,
            keys,
            header: config.header.clone(),
            prefix: config.prefix.clone(),
            encoding: config.encoding,
        })
    }

    /// One for each key, the same for the same key, which it does not show: what it makes of an empty body.
    pub fn key_digests(&self) -> Vec<Signature> {
        let digest = |key: &Hmac<Sha256>| key.clone().finalize().into_bytes().into();
        self.keys.iter().map(digest).collect()
    }

    /// The signature that a head has for this principal; `None` where it has none, or not of this form.
    pub fn signature(&self, head: &[u8]) -> Result<Option<Signature>, Reject> {
        let value = h1::field(head, &self.header)?;
        Ok(value.and_then(|value| {
            let text = value.strip_prefix(self.prefix.as_bytes())?;
            decode(text, self.encoding)
        }))
    }

    /// Whether one of the principal's secrets makes this signature of `body`.
    pub fn verifies(&self, signature: &Signature, body: &[u8]) -> bool {
        let mut verifies = Choice::from(0);
        for key in &self.keys {
            let mut mac = key.clone();
            mac.update(body);
            let made: Signature = mac.finalize().into_bytes().into();
            verifies |= made.ct_eq(signature);
        }
        verifies.into()
    }
}

fn decode(text: &[u8], encoding: SignatureEncoding) -> Option<Signature> {
    let mut signature = [0; SIZE];
    match encoding {
        SignatureEncoding::Hex => {
            if text.len() != 2 * SIZE {
                return None;
            }
            for (byte, pair) in signature.iter_mut().zip(text.chunks_exact(2)) {
                let high = char::from(pair[0]).to_digit(16)?;
                let low = char::from(pair[1]).to_digit(16)?;
                *byte = (high << 4 | low) as u8;
            }
        }
        SignatureEncoding::Base64 => {
            // The decoder wants room for whole groups of three bytes.
            let mut decoded = [0; SIZE + 1];
            let size = STANDARD.decode_slice(text, &mut decoded).ok()?;
            signature = decoded[..size].try_into().ok()?;
        }
    }
    Some(signature)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signer(secrets: &[&str], encoding: SignatureEncoding) -> Signer {
        Signer {
            principal_index: 0,
            keys: secrets
                .iter()
                .map(|secret| Hmac::new_from_slice(secret.as_bytes()).unwrap())
                .collect(),
            header: "X-Hub-Signature-256".into(),
            prefix: "sha256=".into(),
            encoding,
        }
    }

    /// The example of GitHub's documentation, "Validating webhook deliveries".
    const SECRET: &str = "It's a Secret to Everybody";
    const BODY: &[u8] = b"Hello, World!";
    const HEX: &str = "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
    const BASE64: &str = "dXEH6g6yUJ/CESIczphLijdXC211hsIsRvQ3nIsEPhc=";

    #[test]
    fn githubs_example_verifies_under_any_of_several_secrets() {
        for (text, encoding) in [
            (HEX, SignatureEncoding::Hex),
            (&HEX.to_uppercase(), SignatureEncoding::Hex),
            (BASE64, SignatureEncoding::Base64),
        ] {
            let head = format!("POST / HTTP/1.1\r\nx-hub-signature-256: sha256={text}\r\n\r\n");
            for secrets in [&[SECRET][..], &["old", SECRET], &[SECRET, "new"]] {
                let signer = signer(secrets, encoding);
                let signature = signer.signature(head.as_bytes()).unwrap().unwrap();
                assert!(signer.verifies(&signature, BODY));
                assert!(!signer.verifies(&signature, b"Hello, World?"));
                assert!(!signer.verifies(&signature, b""));
            }
            let other = signer(&["old", "new"], encoding);
            let signature = other.signature(head.as_bytes()).unwrap().unwrap();
            assert!(!other.verifies(&signature, BODY));
        }
    }

    #[test]
    fn what_has_not_the_form_of_a_signature_is_none() {
        let hex = signer(&[SECRET], SignatureEncoding::Hex);
        let base64 = signer(&[SECRET], SignatureEncoding::Base64);
        for value in [
            "",
            "sha256=",
            HEX,
            &format!("sha1={HEX}"),
            &format!("sha256={}", &HEX[1..]),
            &format!("sha256={HEX}0"),
            &format!("sha256=g{}", &HEX[1..]),
            &format!("sha256={}", &BASE64[1..]),
            &format!("sha256={BASE64}="),
            &format!("sha256={BASE64}{BASE64}"),
        ] {
            let head = format!("POST / HTTP/1.1\r\nX-Hub-Signature-256: {value}\r\n\r\n");
            for signer in [&hex, &base64] {
                assert_eq!(signer.signature(head.as_bytes()), Ok(None), "{value}");
            }
        }
        assert_eq!(hex.signature(b"POST / HTTP/1.1\r\n\r\n"), Ok(None));
    }
}
