/* The kernel's division by each float on standard input, of every significand in [1, 2). */

#include <math.h>
#include <stdio.h>
#include <string.h>

int main(void)
{
    float c;
    long divisors = 0, wrong = 0;

    for (; fread(&c, sizeof c, 1, stdin) == 1; divisors++) {
        const float rcp = 1.0f / c;
        for (unsigned i = 0; i < 1u << 23; i++) {
            const unsigned bits = i + (127u << 23);
            float x;
            memcpy(&x, &bits, sizeof x);
            const float q = x * rcp;
            const float y = fmaf(fmaf(-c, q, x), rcp, q);
            wrong += y != x / c;
        }
    }
    printf("%ld divisors, %ld wrong quotients\n", divisors, wrong);
    return 0;
}
