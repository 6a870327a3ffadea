//! The assertion of a client certificate: proof that weir has the private key.
//!
//! Before it: the configuration names a PEM.
//! After it: `identity.rs` sends the assertion instead of a secret.
//! Thread: the uplink's runtime. Allocates: per token, about once an hour.
//! Invariant: the key is read for each assertion and given back after it.
//! Not here: the token request. azure_identity has a certificate credential of its own, which needs OpenSSL; this is
//! its client assertion, signed by the library that TLS uses (docs/DECISIONS.md).
//!
//! Source: "Microsoft identity platform application authentication certificate credentials" (PS256, `x5t#S256`), and
//! RFC 7523 §3 for the claims.

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeyPair as RsaKeyPair;
use aws_lc_rs::signature::{KeyPair, RSA_PSS_SHA256};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;

use super::request_id;
use crate::limits::ASSERTION_LIFETIME;
use crate::secret::Secret;

/// A certificate with its private key.
pub struct Certificate {
    key: RsaKeyPair,
    /// base64url of the SHA-256 of the certificate.
    thumbprint: String,
}

impl Certificate {
    /// Reads the key and the certificate that belongs to it, wherever in the PEM they are.
    pub fn parse(pem: &Secret) -> Result<Self, String> {
        let pem = pem.expose().as_bytes();
        let key = PrivateKeyDer::from_pem_slice(pem)
            .map_err(|_| "the PEM has no private key; add it beside the certificate")?;
        let key = match &key {
            PrivateKeyDer::Pkcs1(key) => RsaKeyPair::from_der(key.secret_pkcs1_der()),
            PrivateKeyDer::Pkcs8(key) => RsaKeyPair::from_pkcs8(key.secret_pkcs8_der()),
            _ => return Err("Entra takes RSA keys only, and this is another".into()),
        };
        let key = key.map_err(|_| "the private key is not an RSA key of 2048 bits or more")?;
        // RFC 5280 §4.1: the certificate holds the public key as it is.
        let public_key = key.public_key().as_ref();
        let is_of_key = |certificate: &CertificateDer<'_>| {
            let mut windows = certificate.windows(public_key.len());
            windows.any(|window| window == public_key)
        };
        let certificate = CertificateDer::pem_slice_iter(pem)
            .filter_map(Result::ok)
            .find(is_of_key)
            .ok_or("the PEM has no certificate of its private key; add it")?;
        let thumbprint = URL_SAFE_NO_PAD.encode(digest(&SHA256, &certificate));
        Ok(Certificate { key, thumbprint })
    }

    /// A JWT that is good for one token request. `audience` is the token endpoint.
    pub fn assertion(&self, client_id: &str, audience: &str, now: Timestamp) -> Secret {
        let header = json!({"alg": "PS256", "typ": "JWT", "x5t#S256": self.thumbprint});
        let now = now.as_second();
        let claims = json!({
            "aud": audience,
            "iss": client_id,
            "sub": client_id,
            "jti": request_id(),
            "nbf": now,
            "exp": now + ASSERTION_LIFETIME.as_secs() as i64,
        });
        let part = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(header), part(claims));
        let mut signature = vec![0; self.key.public_modulus_len()];
        self.key
            .sign(
                &RSA_PSS_SHA256,
                &SystemRandom::new(),
                signed.as_bytes(),
                &mut signature,
            )
            .expect("a key that was read signs, into a buffer of its size");
        let signature = URL_SAFE_NO_PAD.encode(signature);
        Secret::new(format!("{signed}.{signature}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::signature::{RSA_PSS_2048_8192_SHA256, UnparsedPublicKey};

    /// A new key, then its certificate.
    fn pem() -> (String, String) {
        let algorithm = &rcgen::PKCS_RSA_SHA256;
        let key = rcgen::KeyPair::generate_rsa_for(algorithm, rcgen::RsaKeySize::_2048).unwrap();
        let parameters = rcgen::CertificateParams::new(["weir.example".to_owned()]).unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        (key.serialize_pem(), certificate.pem())
    }

    fn parsed(part: &str) -> serde_json::Value {
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
    }

    #[test]
    fn an_assertion_is_verified_by_the_public_key() {
        let (key, certificate) = pem();
        let certificate = Certificate::parse(&Secret::new(format!("{key}{certificate}"))).unwrap();
        let now = Timestamp::from_second(1_790_000_000).unwrap();
        let assertion = certificate.assertion("client", "https://login/t/oauth2/v2.0/token", now);
        let (signed, signature) = assertion.expose().rsplit_once('.').unwrap();
        let (header, claims) = signed.split_once('.').unwrap();
        assert_eq!(parsed(header)["alg"], "PS256");
        // SHA-256 is 32 bytes, 43 characters without padding.
        assert_eq!(parsed(header)["x5t#S256"].as_str().unwrap().len(), 43);
        let claims = parsed(claims);
        assert_eq!(claims["iss"], "client");
        assert_eq!(claims["sub"], "client");
        assert_eq!(claims["aud"], "https://login/t/oauth2/v2.0/token");
        assert_eq!(claims["exp"].as_i64().unwrap(), 1_790_000_300);
        let key = UnparsedPublicKey::new(
            &RSA_PSS_2048_8192_SHA256,
            certificate.key.public_key().as_ref(),
        );
        let signature = URL_SAFE_NO_PAD.decode(signature).unwrap();
        key.verify(signed.as_bytes(), &signature).unwrap();
        assert!(key.verify(b"another", &signature).is_err());
    }

    #[test]
    fn what_is_missing_is_named_and_nothing_is_repeated() {
        let (key, certificate) = pem();
        let foreign = format!("{key}{}", pem().1);
        for (pem, part) in [
            (&*key, "no certificate"),
            (&*foreign, "no certificate"),
            (&*certificate, "no private key"),
            ("canary", "no private key"),
        ] {
            let Err(error) = Certificate::parse(&Secret::new(pem)) else {
                panic!("this must not be valid");
            };
            assert!(error.contains(part) && !error.contains("canary"), "{error}");
        }
        // In the other order it is as good.
        let swapped = format!("{certificate}{key}");
        assert!(Certificate::parse(&Secret::new(swapped)).is_ok());
    }
}
