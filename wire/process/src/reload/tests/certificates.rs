//! Certificates and keys that cannot be used, or do not fit their use.

use super::*;

#[test]
fn a_private_key_is_read_without_its_certificate() {
    let rig = Rig::new();
    let (certificate, key) = pair(2029, 2031);
    write_pair(&rig, &certificate, &key);
    let files = CertificatePair { certificate: rig.path("crt"), key: rig.path("key") };
    let (identity, _) = Files::default().identity(&files, Role::Client).unwrap();
    let alone = Files::default().private_key(&files.key).unwrap();
    assert_eq!(alone.secret_der(), identity.key.secret_der());
    let error = Files::default().private_key(&files.certificate).unwrap_err().to_string();
    let expected = format!("{}: holds no private key, but a", files.certificate.display());
    assert!(error.to_string().starts_with(&expected), "{error}");
}

#[test]
fn a_key_of_another_certificate_is_reported_with_the_certificates_dates() {
    let (one, other) = (pair(2029, 2031), pair(2029, 2031));
    let rig = Rig::new();
    write_pair(&rig, &one.0, &other.1);
    let files = CertificatePair { certificate: rig.path("crt"), key: rig.path("key") };
    let error = Files::default().identity(&files, Role::Client).unwrap_err().to_string();
    let (certificate, key) = (files.certificate.display(), files.key.display());
    for part in [
        format!("{key}: the key is not that of the certificate"),
        "valid from 2029-01-01T00:00:00Z to 2031-01-01T00:00:00Z".into(),
        format!("in {certificate}"),
    ] {
        assert!(error.contains(&part), "{part} in {error}");
    }
}

/// No clock finds it valid, so it is no warning as one that has expired is.
#[test]
fn a_certificate_that_ends_before_it_begins_is_refused_with_its_dates() {
    let rig = Rig::new();
    let (certificate, key) = pair(2031, 2029);
    write_pair(&rig, &certificate, &key);
    let pair = CertificatePair { certificate: rig.path("crt"), key: rig.path("key") };
    let error = Files::default().identity(&pair, Role::Client).unwrap_err().to_string();
    for part in [
        "valid from 2031-01-01T00:00:00Z to 2029-01-01T00:00:00Z",
        "is never valid: its notAfter is before its notBefore; issue it anew",
    ] {
        assert!(error.contains(part), "{part} in {error}");
    }
}

#[test]
fn a_server_s_certificate_of_version_1_is_a_warning() {
    let rig = Rig::new();
    let certificate = include_str!("../../../../transport/src/tls/verifier/version1/leaf.crt");
    let key = include_str!("../../../../transport/src/tls/verifier/version1/leaf.key");
    write_pair(&rig, certificate, key);
    let pair = CertificatePair { certificate: rig.path("crt"), key: rig.path("key") };
    for (role, faults) in [(Role::Server, 1), (Role::Client, 0)] {
        let mut files = Files::default();
        files.identity(&pair, role).unwrap();
        let found = files.unfit();
        assert_eq!(found.len(), faults, "{role:?}: {found:?}");
        assert!(found.iter().all(|text| text.contains("is not of X.509 version 3")), "{found:?}");
    }
}

/// The warnings about a pair of a certificate with these parameters in this role.
fn unfit(role: Role, set: impl FnOnce(&mut CertificateParams)) -> Vec<String> {
    let rig = Rig::new();
    let mut params = CertificateParams::new(vec!["a".to_owned()]).unwrap();
    set(&mut params);
    let key = KeyPair::generate().unwrap();
    write_pair(&rig, &params.self_signed(&key).unwrap().pem(), &key.serialize_pem());
    let pair = CertificatePair { certificate: rig.path("crt"), key: rig.path("key") };
    let mut files = Files::default();
    files.identity(&pair, role).unwrap();
    files.unfit().to_vec()
}

#[test]
fn a_certificate_that_peers_refuse_in_its_role_is_a_warning() {
    use rcgen::ExtendedKeyUsagePurpose::{Any, ClientAuth, ServerAuth};
    let nameless = |params: &mut CertificateParams| params.subject_alt_names.clear();
    let used = |usages: &[rcgen::ExtendedKeyUsagePurpose]| {
        let usages = usages.to_vec();
        move |params: &mut CertificateParams| params.extended_key_usages = usages
    };
    let found = unfit(Role::Server, nameless);
    assert!(found.len() == 1 && found[0].contains("has no subjectAltName"), "{found:?}");
    assert_eq!(unfit(Role::Client, nameless), [""; 0]);
    for (role, other, lacking) in [
        (Role::Server, ClientAuth, "extendedKeyUsage lacks serverAuth"),
        (Role::Client, ServerAuth, "extendedKeyUsage lacks clientAuth"),
    ] {
        let found = unfit(role, used(&[other]));
        assert!(found.len() == 1 && found[0].contains(lacking), "{role:?}: {found:?}");
        for usages in [&[][..], &[Any], &[ServerAuth, ClientAuth]] {
            assert_eq!(unfit(role, used(usages)), [""; 0], "{role:?} {usages:?}");
        }
    }
}

#[test]
fn a_certificate_that_a_ca_has_issued_is_a_warning_in_a_file_of_cas() {
    use rcgen::{BasicConstraints, DnType, IsCa, Issuer};
    let rig = Rig::new();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "ca");
    let ca = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    let leaf_key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["a".to_owned()]).unwrap();
    let leaf = leaf.signed_by(&leaf_key, &issuer).unwrap().pem();
    let unfit = |pem: &str| {
        rig.write("ca", pem);
        let mut files = Files::default();
        files.authorities(&rig.path("ca")).unwrap();
        files.unfit().to_vec()
    };
    assert_eq!(unfit(&ca), [""; 0]);
    assert_eq!(unfit(&pair(2029, 2031).0), [""; 0], "its own CA");
    let found = unfit(&(ca + &leaf));
    assert!(found.len() == 1 && found[0].contains("is not a CA's"), "{found:?}");
}
